"""Hard gates, zeroed weights, a smaller model and its folder on disk are the same model."""

import json

import pytest
import torch

from lethebench.errors import UserError
from lethebench.pruning import (
    count,
    find_sites,
    gated,
    installed,
    load_pruned,
    pack,
    save_pruned,
    shrink,
    zero_,
    zeroed,
)
from lethebench.unlearning import applied
from lethebench.zoo import wrap


def masked(tiny, masks):
    gates = {name: mask.double() for name, mask in masks.items()}
    with gated(tiny.denoiser, find_sites(tiny.denoiser), gates):
        return tiny.output()


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def differ(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd", {"norm": 7 * 3, "residual": 8, "attn": 7 * 2, "ffn": 7}),
        ("flux", {"norm": 3, "attn": 2, "ffn": 3}),
        ("sd3", {"norm": 4, "attn": 2, "ffn": 3}),
    ],
)
def test_table_of_sites(make_tiny, name, expected):
    """Counted by hand: FLUX has a double and a single block; SD3's last block has no ``ff_context``."""
    kinds = [s.kind for s in find_sites(make_tiny(name).denoiser)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected


def test_gates_of_each_image(any_tiny, random_masks):
    """Gates ``[images, size]``: every image as with its own gates alone, also where images come twice."""
    sites = find_sites(any_tiny.denoiser)
    masks = [random_masks(any_tiny.denoiser, 0.5, seed=s) for s in (1, 2)]
    alone = [masked(any_tiny, m)[i] for i, m in enumerate(masks)]
    each = {name: torch.stack([m[name].double() for m in masks]) for name in masks[0]}
    with gated(any_tiny.denoiser, sites, each):
        assert differ(any_tiny.output(), torch.stack(alone)) < 1e-10
    once = {name: value[:1] for name, value in each.items()}
    with gated(any_tiny.denoiser, sites, once):
        assert differ(any_tiny.output(), masked(any_tiny, masks[0])) < 1e-10


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_zeroed_and_smaller_equal_masked(any_tiny, random_masks, share):
    masks = random_masks(any_tiny.denoiser, share)
    base, expected = any_tiny.output(), masked(any_tiny, masks)
    assert differ(base, expected) > 1e-3
    with zeroed(any_tiny.denoiser, masks):
        assert differ(any_tiny.output(), expected) < 1e-10
    assert torch.equal(any_tiny.output(), base)
    smaller = denoiser_of(shrink(any_tiny.pipe, masks))
    assert differ(any_tiny.output(smaller), expected) < 1e-10
    assert torch.equal(any_tiny.output(), base)
    counts = count(any_tiny.denoiser, masks)
    left = sum(p.numel() for p in smaller.parameters())
    if share < 1:
        gone = counts.dead / counts.parameters
        assert gone == pytest.approx(1 - left / counts.parameters, abs=0.06)
    else:
        assert set(counts.deactivated.values()) == {1.0} and counts.sparsity == 1.0


@pytest.mark.parametrize("kind", ["ffn", "norm", "residual", "attn"])
def test_each_kind_alone(any_tiny, random_masks, kind):
    masks = random_masks(any_tiny.denoiser, 0.5, seed=3)
    sites = {s.name for s in find_sites(any_tiny.denoiser, (kind,))}
    if kind == "residual" and any_tiny.name in ("sd3", "flux"):
        assert not sites
        return
    masks = {name: mask if name in sites else torch.ones_like(mask) for name, mask in masks.items()}
    expected = masked(any_tiny, masks)
    smaller = denoiser_of(shrink(any_tiny.pipe, masks))
    assert differ(any_tiny.output(smaller), expected) < 1e-10
    with zeroed(any_tiny.denoiser, masks):
        zeros = sum(int((p == 0).sum()) for p in any_tiny.denoiser.parameters())
    assert zeros == count(any_tiny.denoiser, masks).dead > 0


def test_one_kept_element(any_tiny):
    """EcoDiff's code fails on exactly one kept neuron."""
    masks = {s.name: torch.arange(s.size) == s.size - 1 for s in find_sites(any_tiny.denoiser)}
    expected = masked(any_tiny, masks)
    assert differ(any_tiny.output(denoiser_of(shrink(any_tiny.pipe, masks))), expected) < 1e-10


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_saved_model_loads_again(any_tiny, random_masks, tmp_path, share):
    masks = random_masks(any_tiny.denoiser, share)
    smaller = shrink(any_tiny.pipe, masks)
    folder = save_pruned(smaller, tmp_path / "pruned", {"method": "uniforget"})
    record = json.loads((folder / "pruning.json").read_text())
    assert record["record"] == {"method": "uniforget"} and record["modules"]
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt"))
    again = load_pruned(folder, torch.float64)
    assert type(again) is type(any_tiny.pipe)
    assert torch.equal(any_tiny.output(denoiser_of(again)), any_tiny.output(denoiser_of(smaller)))
    original = sum(p.numel() for p in any_tiny.denoiser.parameters())
    assert sum(p.numel() for p in denoiser_of(again).parameters()) < original


def test_pruned_folder_is_a_model(make_tiny, random_masks, tmp_path):
    """``lethebench.zoo`` loads it like any model."""
    from lethebench.zoo import load_model

    tiny = make_tiny("sd")
    smaller = shrink(tiny.pipe, random_masks(tiny.denoiser, 0.5))
    save_pruned(smaller, tmp_path / "pruned")
    model = load_model(str(tmp_path / "pruned"))
    assert model.dtype == torch.float32 and model.denoiser.pruned_forms


def test_refusals(make_tiny, random_masks, tmp_path):
    tiny = make_tiny("sd")
    masks = random_masks(tiny.denoiser, 0.5)
    smaller = shrink(tiny.pipe, masks)
    with pytest.raises(UserError, match="pruned already"):
        shrink(smaller, masks)
    with pytest.raises(UserError, match="isn't pruned"):
        save_pruned(tiny.pipe, tmp_path)
    with pytest.raises(UserError, match="no pruned model"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match="no maskable module 'nowhere'"):
        zero_(tiny.denoiser, {"nowhere": torch.ones(3, dtype=torch.bool)})
    name = next(iter(masks))
    with pytest.raises(ValueError, match="has shape"):
        zero_(tiny.denoiser, {name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="unknown kind of mask 'conv'"):
        find_sites(tiny.denoiser, ("conv",))


def test_installed_inside_another_installation(any_tiny, random_masks):
    """Composed methods: each context restores what it found."""
    first = pack(random_masks(any_tiny.denoiser, 0.2, seed=1))
    name = next(n for n, _ in any_tiny.denoiser.named_parameters() if n.endswith("weight"))
    second = {f"edit.denoiser.{name}": torch.full_like(any_tiny.denoiser.get_parameter(name), 0.01)}
    model = wrap(any_tiny.pipe)  # which changes the order of the UNet's memory, and so rounding
    base = any_tiny.output()
    with applied(model, second):
        changed = any_tiny.output()
        with installed(any_tiny.denoiser, first):
            assert differ(any_tiny.output(), changed) > 0
        assert torch.equal(any_tiny.output(), changed)
    assert torch.equal(any_tiny.output(), base) and not torch.equal(changed, base)
