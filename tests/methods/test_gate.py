"""The gate and the loss against values worked out by hand or by quadrature."""

import math

import pytest
import torch

from lethebench.methods.uniforget.gate import Gate
from lethebench.methods.uniforget.loss import reconstruction, relaxed, size_by_layer, size_of_masks

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
"""Midpoints for quadrature over the uniform noise."""


def sampled(mask, delta_re):
    parameter = torch.full_like(U, mask, requires_grad=True)
    gate = Gate(delta_re=delta_re).sampled(parameter, U)
    (gradient,) = torch.autograd.grad(gate.sum(), parameter)
    return gate.detach(), gradient


@pytest.mark.parametrize(
    ("mask", "delta_re", "mean", "active"),
    [
        (3.0, 0.1, 0.978, 0.22),
        (3.0, 0.5, 1.000, 0.034),
        (2.5, 0.5, 0.990, 0.25),
        (4.0, 1.0, 1.0, 0.0),
        (0.0, 0.5, 0.5, 1.0),
    ],
)
def test_gate_statistics(mask, delta_re, mean, active):
    """The figures of the research note, section 2.2."""
    gate, gradient = sampled(mask, delta_re)
    assert float(gate.mean()) == pytest.approx(mean, abs=6e-3)
    share = float((gradient != 0).double().mean())
    assert share == pytest.approx(active, abs=6e-3)
    closed = Gate(delta_re=delta_re).active_probability(torch.tensor(mask, dtype=torch.float64))
    assert float(closed) == pytest.approx(share, abs=1e-4)


def test_gate_by_hand():
    """Without noise (u = 1/2) the gate is 1.2 * sigmoid(mask / 0.83) - 0.1, clamped."""
    mask = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    expected = [max(0.0, min(1.0, 1.2 / (1 + math.exp(-m / 0.83)) - 0.1)) for m in mask.tolist()]
    gate = Gate()
    assert torch.allclose(gate.expected(mask), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert torch.equal(gate.sampled(mask, torch.full_like(mask, 0.5)), gate.expected(mask))
    u, m = 0.9, 0.3
    logit = math.log(u + 0.5) - math.log(1 - u + 0.5) + m
    got = gate.sampled(torch.tensor([m], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))
    assert float(got) == pytest.approx(1.2 / (1 + math.exp(-logit / 0.83)) - 0.1)


def test_gate_is_exactly_zero_from_minus_083_log_11():
    edge = -0.83 * math.log(11)
    mask = torch.tensor([edge - 1e-9, edge + 1e-6, -edge + 1e-9, -edge - 1e-6], dtype=torch.float64)
    gates = Gate().expected(mask)
    assert gates[0] == 0 < gates[1] and gates[2] == 1 > gates[3]


def test_threshold_rounds_the_gate_without_noise():
    mask = torch.linspace(-3, 3, 100)
    assert torch.equal(Gate().kept(mask), Gate().expected(mask) > 0.5)


def test_size_of_masks():
    """sigmoid(0.4 * 3 + 1) = sigmoid(2.2) = 0.900; the mean is over elements, not over kinds."""
    three = torch.full((5,), 3.0)
    assert float(relaxed(three, 0.4, 1.0)[0]) == pytest.approx(0.9002495, abs=1e-6)
    masks = {"ffn": three, "norm": torch.full((15,), -2.5)}
    assert float(size_of_masks(masks, 0.4, 1.0)) == pytest.approx((5 * 0.9002495 + 15 * 0.5) / 20, abs=1e-6)


def test_norm_masks_are_in_the_size():
    """In EcoDiff's code they aren't."""
    masks = {
        "ffn": torch.full((5,), 3.0, requires_grad=True),
        "norm": torch.full((3,), 3.0, requires_grad=True),
    }
    for size in (size_of_masks(masks, 0.4, 1.0), size_by_layer({k: [m] for k, m in masks.items()}, 0.4, 1.0)):
        gradients = torch.autograd.grad(size, list(masks.values()))
        assert all((g > 0).all() for g in gradients)


def test_size_by_layer():
    layers = {"ffn": [torch.full((2,), 3.0), torch.full((6,), -2.5)], "norm": [torch.full((4,), -2.5)]}
    assert float(size_by_layer(layers, 0.4, 1.0)) == pytest.approx((0.9002495 + 0.5) / 2 + 0.5, abs=1e-6)


def test_reconstruction_is_the_mean_square():
    a, b = torch.zeros(2, 3), torch.tensor([[1.0, 2, 0], [0, 0, 1]])
    assert float(reconstruction(a, b)) == pytest.approx(1.0)
