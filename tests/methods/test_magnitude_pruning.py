"""Magnitude pruning: the smallest weights of each kind, at random pruning's shares."""

import pytest
import torch

from lethebench.errors import UserError
from lethebench.method import configure
from lethebench.methods.magnitude_pruning import (
    MagnitudePruning,
    element_norms,
    magnitude_masks,
    without_smallest,
)
from lethebench.methods.random_pruning import RandomPruning
from lethebench.pruning import count, find_sites, unpack, zeroed


def test_strengths_are_those_of_random_pruning():
    assert dict(MagnitudePruning.strengths) == dict(RandomPruning.strengths)
    assert MagnitudePruning.control and not MagnitudePruning.knowledge


def test_norms_are_of_what_dies_with_an_element(any_tiny):
    """An element's norm, by name: the entries that zeroing it (and its group's other elements) zeroes.

    Residual channels share rows of conv1 by groups, so there a whole group goes at once.
    """
    denoiser = any_tiny.denoiser
    for site in find_sites(denoiser):
        group = max(cut.layout.group for cut in site.cuts)
        norms = element_norms(denoiser, site)
        assert norms.shape == (site.size,) and (norms > 0).all()
        mask = torch.ones(site.size, dtype=torch.bool)
        mask[:group] = False
        before = {n: p.clone() for n, p in denoiser.named_parameters()}
        with zeroed(denoiser, {site.name: mask}):
            gone = torch.cat([before[n][(p == 0) & (before[n] != 0)] for n, p in denoiser.named_parameters()])
        expected = gone.square().mean().sqrt()
        assert float(norms[:group].square().mean().sqrt()) == pytest.approx(float(expected), rel=1e-9)


def test_scaling_an_element_scales_its_norm(make_tiny):
    """FLUX's single block too, whose neurons are columns of ``proj_out`` after the attention's."""
    denoiser = make_tiny("flux").denoiser
    block = denoiser.single_transformer_blocks[0]
    site = next(s for s in find_sites(denoiser, ("ffn",)) if s.name.startswith("single"))
    before = element_norms(denoiser, site)
    with torch.no_grad():
        for part in (block.proj_mlp.weight[3], block.proj_mlp.bias[3]):
            part.mul_(2)
        block.proj_out.weight[:, block.proj_out.in_features - site.size + 3].mul_(2)
    after = (element_norms(denoiser, site) / before).tolist()
    assert after.pop(3) == pytest.approx(2) and after == [1.0] * (site.size - 1)


def test_the_smallest_go():
    first, second = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 4.0, 1.0])
    found = [m.tolist() for m in without_smallest([first, second], 0.5)]
    assert found == [[True, False, True], [False, True, False]]
    equal = torch.ones(6, dtype=torch.float64)
    assert without_smallest([equal], 0.5)[0].tolist() == [False] * 3 + [True] * 3
    assert all(bool(m.all()) for m in without_smallest([first, second], 0.0))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_by_an_explicit_sort(any_tiny, scope):
    denoiser = any_tiny.denoiser
    shares = {"ffn": 0.4, "attn": 0.5}
    sites = find_sites(denoiser, tuple(shares))
    masks = magnitude_masks(denoiser, sites, shares, scope)
    assert set(masks) == {s.name for s in sites}
    for kind, share in shares.items():
        group = [s for s in sites if s.kind == kind]
        for part in ([s] for s in group) if scope == "layer" else (group,):
            ranked = sorted(
                (float(norm), s.name, i) for s in part for i, norm in enumerate(element_norms(denoiser, s))
            )
            off = {(name, i) for _, name, i in ranked[: round(share * len(ranked))]}
            assert off == {(s.name, i) for s in part for i in (~masks[s.name]).nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_as_many_as_random_pruning_turns_off(make_model, make_task, name):
    """Equal sparsity, by kind and in total, at each strength; and the model is restored."""
    model = make_model(name)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    for strength in MagnitudePruning.strengths:
        ours, random = (configure(cls, strength) for cls in (MagnitudePruning, RandomPruning))
        found, expected = (m.fit(make_task(m, model)) for m in (ours, random))
        for fact in ("deactivated", "sparsity", "mask_elements"):
            assert found.facts[fact] == expected.facts[fact]
        masks = unpack(found.tensors)
        assert count(model.denoiser, masks).sparsity == found.facts["sparsity"] > 0
        with ours.apply(model, found):
            assert any(not torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": 1.5}, "norm is a share between 0 and 1, not 1.5"),
        ({"scope": "block"}, "scope is 'global' or 'layer', not 'block'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        configure(MagnitudePruning, "weak", changes)
