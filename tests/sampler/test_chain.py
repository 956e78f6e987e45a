"""The differentiable chain."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler
from tiny_pipelines import PIPELINES, tiny_flux, tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.prompts import Prompt, Role
from lethebench.sampler import Chain, encode_prompts
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
TEXTS = ("a red star", "a blue circle")
KEYS = [ImageKey("test@1", Prompt(t, t, Role.NEUTRAL, t), 0) for t in TEXTS]
DIFFERENTIABLE = ["sd", "sd-v", "sd-euler", "sdxl", "sd3", "flux-dev"]


def chain_of(pipe):
    model = wrap(pipe)
    return Chain(model, encode_prompts(model, TEXTS, SETTINGS), SETTINGS, KEYS)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_step_is_a_pure_function(name):
    chain = chain_of(PIPELINES[name]())
    with torch.no_grad():
        forward, latents = [], chain.initial()
        inputs = []
        for index in range(chain.steps):
            inputs.append(latents)
            latents = chain.step(index, latents)
            forward.append(latents)
        for index in (2, 0, 1, 1):
            assert torch.equal(chain.step(index, inputs[index]), forward[index])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_reach_latents_parameters_and_conditioning(name):
    model = wrap(PIPELINES[name]())
    conditioning = encode_prompts(model, TEXTS, SETTINGS)
    embeds = conditioning.embeds.clone().requires_grad_()
    chain = Chain(model, conditioning.with_embeds(embeds), SETTINGS, KEYS)
    weight = next(p for n, p in model.denoiser.named_parameters() if "attn" in n and n.endswith("weight"))
    weight.requires_grad_(True)
    latents = chain.initial().requires_grad_()
    chain.run(latents).square().mean().backward()
    for tensor in (latents, weight, embeds):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().max() > 0


def test_gradient_equals_finite_difference():
    pipe = tiny_sd()
    pipe.unet.double()
    pipe.text_encoder.double()
    chain = chain_of(pipe)
    chain._adapter.predict = in_double(chain._adapter)
    with torch.no_grad():
        start = chain.initial().double()
    direction = torch.linspace(-1, 1, start.numel(), dtype=torch.float64).reshape(start.shape)
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (analytic,) = torch.autograd.grad(chain.run(start + scale * direction).square().mean(), scale)
    with torch.no_grad():
        up, down = (chain.run(start + h * direction).square().mean() for h in (1e-5, -1e-5))
    assert torch.isclose(analytic, (up - down) / 2e-5, rtol=1e-5)


def in_double(adapter):
    """The adapter's prediction without its rounding to float32."""

    def predict(latents, timestep, conditioning):
        arguments = adapter._arguments(latents, timestep, conditioning)
        return adapter.denoiser(**arguments, return_dict=False)[0]

    return predict


def test_a_module_hook_in_the_denoiser_gets_its_gradient():
    chain = chain_of(tiny_flux())
    mask = torch.ones((), requires_grad=True)
    block = chain.model.denoiser.transformer_blocks[0].ff
    handle = block.register_forward_hook(lambda module, args, out: out * mask)
    chain.run(chain.initial()).square().mean().backward()
    handle.remove()
    assert mask.grad is not None and mask.grad != 0


def test_backpropagation_step_by_step_equals_the_whole():
    """What UniForget does: recompute one step at a time, in constant memory."""
    chain = chain_of(tiny_sd())
    weight = chain.model.denoiser.conv_in.weight.requires_grad_(True)
    chain.run(chain.initial()).square().mean().backward()
    whole = weight.grad.clone()
    weight.grad = None
    with torch.no_grad():
        inputs = [chain.initial()]
        for index in range(chain.steps):
            inputs.append(chain.step(index, inputs[-1]))
    gradient = 2 * inputs[-1] / inputs[-1].numel()
    for index in reversed(range(chain.steps)):
        latents = inputs[index].detach().requires_grad_()
        chain.step(index, latents).backward(gradient)
        gradient = latents.grad
    assert torch.allclose(weight.grad, whole, rtol=1e-3, atol=1e-5)


def test_predictions():
    chain = chain_of(tiny_sd())
    combined, unconditional, conditional = chain.predict(1, chain.initial())
    assert torch.equal(combined, unconditional + 4.0 * (conditional - unconditional))
    latents = chain.initial()
    assert torch.equal(chain.advance(1, latents, chain.predict(1, latents).combined), chain.step(1, latents))
    assert chain.timesteps.tolist() == sorted(chain.timesteps.tolist(), reverse=True)
    with pytest.raises(IndexError):
        chain.step(3, latents)


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler]
)
def test_schedulers_with_a_memory_are_refused(scheduler):
    with pytest.raises(UserError, match="scheduler to ddim"):
        chain_of(tiny_sd(scheduler))


def test_nothing_is_recorded_unless_asked():
    chain = chain_of(tiny_sd())
    assert not chain.run(chain.initial()).requires_grad
