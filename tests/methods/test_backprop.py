"""Backpropagation step by step: the gradients of the whole graph, in memory that doesn't grow."""

from contextlib import contextmanager

import pytest
import torch
from tiny_pipelines import tiny_sd

from lethebench.methods.uniforget.backprop import backward_through_chain
from lethebench.methods.uniforget.gate import Gate
from lethebench.methods.uniforget.loss import reconstruction
from lethebench.methods.uniforget.masks import MaskParameters, NoisyGates
from lethebench.pruning import find_sites


class PlainChain:
    """Float64 steps of a tiny UNet: z - (0.3 + 0.1 t) * eps(z, t)."""

    def __init__(self, steps):
        pipe = tiny_sd()
        self.denoiser = pipe.unet.requires_grad_(False).double()
        self.steps = steps
        draws = torch.Generator().manual_seed(0)
        self.text = torch.randn(2, 16, 16, generator=draws, dtype=torch.float64)
        self.start = torch.randn(2, 4, 8, 8, generator=draws, dtype=torch.float64)
        self.target = torch.randn(2, 4, 8, 8, generator=draws, dtype=torch.float64)

    def step(self, index, latents):
        time = torch.tensor(900 - 100 * index)
        predicted = self.denoiser(latents, time, encoder_hidden_states=self.text, return_dict=False)[0]
        return latents - (0.3 + 0.1 * index) * predicted

    def loss(self, latents):
        return reconstruction(latents, self.target)


def masks_of(chain, init=1.0):
    sites = find_sites(chain.denoiser)
    return MaskParameters(sites, init, torch.device("cpu"), torch.float64)


def gradients(chain, recompute, seed=5, images=None):
    masks = masks_of(chain)
    gates = NoisyGates(chain.denoiser, masks, Gate(), seed, images)
    loss = backward_through_chain(chain, chain.start, gates, chain.loss, recompute=recompute)
    return loss, {k: m.grad for k, m in masks.by_kind.items()}


@pytest.mark.parametrize("images", [None, 2])
def test_gradients_are_those_of_the_whole_graph(images):
    """Attention heads included; also equal to autograd on a loop written out here."""
    chain = PlainChain(3)
    loss, by_steps = gradients(chain, recompute=True, images=images)
    whole_loss, at_once = gradients(chain, recompute=False, images=images)
    assert float(loss) == pytest.approx(float(whole_loss), abs=1e-12)
    masks = masks_of(chain)
    gates = NoisyGates(chain.denoiser, masks, Gate(), 5, images)
    latents = chain.start
    for index in range(chain.steps):
        with gates(index):
            latents = chain.step(index, latents)
    plain = dict(
        zip(
            masks.by_kind, torch.autograd.grad(chain.loss(latents), list(masks.by_kind.values())), strict=True
        )
    )
    assert set(by_steps) == {"ffn", "norm", "residual", "attn"}
    for kind, gradient in by_steps.items():
        scale = plain[kind].abs().max()
        assert scale > 1e-4
        assert (gradient - plain[kind]).abs().max() < 1e-6 * scale
        assert (at_once[kind] - plain[kind]).abs().max() < 1e-6 * scale


def test_noise_is_replayed_and_fresh_for_each_step():
    chain = PlainChain(2)
    masks = masks_of(chain)
    gates = NoisyGates(chain.denoiser, masks, Gate(), 7)
    with torch.no_grad():
        first, again, other = [], [], []
        for index, found in ((0, first), (0, again), (1, other)):
            with gates(index):
                found.append(chain.denoiser(chain.start, torch.tensor(500), chain.text, return_dict=False)[0])
    assert torch.equal(first[0], again[0])
    assert not torch.allclose(first[0], other[0])


def test_other_noise_in_the_second_run_would_spoil_the_gradients():
    """The defect of EcoDiff's code, which our check would see."""
    chain = PlainChain(3)
    _, right = gradients(chain, recompute=True)
    masks = masks_of(chain)
    calls = iter(range(1000))

    @contextmanager
    def unseeded(index):
        with NoisyGates(chain.denoiser, masks, Gate(), next(calls))(index):
            yield

    backward_through_chain(chain, chain.start, unseeded, chain.loss)
    wrong = masks.by_kind["ffn"].grad
    assert (wrong - right["ffn"]).abs().max() > 1e-2 * right["ffn"].abs().max()


def test_hooks_are_removed():
    chain = PlainChain(1)
    gradients(chain, recompute=True)
    hooks = [h for m in chain.denoiser.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


class Held:
    """Bytes that autograd keeps for the backward pass, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return _Packed(self, tensor)

    @staticmethod
    def unpack(packed):
        return packed.tensor


class _Packed:
    def __init__(self, held, tensor):
        self.held, self.tensor, self.size = held, tensor, tensor.numel() * tensor.element_size()
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self):
        self.held.now -= self.size


def test_graph_does_not_grow_with_the_chain():
    most = {}
    for recompute in (True, False):
        for steps in (2, 6):
            held = Held()
            with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
                gradients(PlainChain(steps), recompute)
            most[recompute, steps] = held.most
    assert most[True, 6] <= 1.05 * most[True, 2]
    assert most[False, 6] > 2.5 * most[False, 2]
