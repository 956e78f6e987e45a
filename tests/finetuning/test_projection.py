"""Gradient projection: subspaces, the projector, what each variant keeps out of the update, and the naive form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_finetuning import BUILDERS, SAMPLER, equal, examples, model, train
from torch import nn

from lethebench.errors import UserError
from lethebench.finetuning.hooks import LoraModule, TrainingHooks
from lethebench.finetuning.lora import applied_lora, lora_deltas, lora_targets
from lethebench.finetuning.projection import EmbeddingProjection, GradientProjection, leakage, project
from lethebench.finetuning.settings import LoraSettings
from lethebench.finetuning.subspace import (
    SensitivePrompt,
    _inputs,
    _Rows,
    concept_subspaces,
    layer_kind,
    subspace,
)
from lethebench.sampler import encode_prompts
from lethebench.unlearning import encode, prediction
from lethebench.unlearning.edits import component

PROMPTS = (
    SensitivePrompt("a striped star in a city", "striped star"),
    SensitivePrompt("a striped star", "striped star"),
)
TEXT_FED = {"sd3": ("context_embedder",), "flux": ("context_embedder",), "sd": (), "sdxl": ()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(found, *more):
    """The family's targets, and more."""
    own = {n.rpartition("attn.")[2] for n in lora_targets(found, LoraSettings()) if "attn." in n}
    ends = sorted(own) or ["to_q", "to_k", "to_v", "to_out.0"]
    return [*ends, *more]


def bases(found, targets=(), **changes):
    names = lora_targets(found, LoraSettings(targets=tuple(targets)))
    draws = torch.Generator().manual_seed(3)
    return concept_subspaces(found, names, PROMPTS, SAMPLER, draws, **{"energy": 1.0, "levels": 2, **changes})


# --- subspaces and the projector ---


def test_subspace_is_numpys_and_keeps_the_energy():
    rows = normal(40, 12) * torch.logspace(0, -3, 12, dtype=torch.float64)
    _, sigma, vh = np.linalg.svd(rows.numpy(), full_matrices=False)
    shares = np.cumsum(sigma**2) / np.sum(sigma**2)
    for energy in (0.5, 0.9, 0.97, 0.999):
        expected = int(np.argmax(shares >= energy)) + 1
        found = subspace(rows, energy=energy)
        assert found.shape == (12, expected)
        np.testing.assert_allclose((found @ found.T).numpy(), vh[:expected].T @ vh[:expected], atol=1e-12)
    assert subspace(rows, dimension=3).shape == (12, 3)
    assert subspace(rows[:2], energy=1.0).shape == subspace(rows[:2], dimension=9).shape == (12, 2)
    assert subspace(torch.zeros(3, 12)).shape == (12, 0)
    twice = torch.cat([rows[:2], rows[:2]])
    assert subspace(twice, energy=1.0).shape == (12, 2)  # the numerical rank


def test_rows_of_any_number_keep_their_subspace():
    rows, few = normal(300, 6) * torch.logspace(0, -2, 6, dtype=torch.float64), _Rows()
    for part in rows.split(7):
        few.add(part)
    assert len(few.rows) <= 24
    one, other = subspace(rows, dimension=3), subspace(few.rows, dimension=3)
    torch.testing.assert_close(one @ one.T, other @ other.T)


def test_the_projector_in_closed_form():
    basis = subspace(normal(5, 12), energy=1.0)
    whole, rows = torch.eye(12, dtype=torch.float64), normal(4, 12, seed=1)
    projector = project(whole, basis)
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector, projector.T)
    torch.testing.assert_close(project(basis.T, basis), torch.zeros(5, 12, dtype=torch.float64))
    torch.testing.assert_close(project(rows, basis, 0.25), rows @ (whole - 0.25 * basis @ basis.T))
    assert torch.equal(project(rows, basis, 0.0), rows)
    outside = project(rows, basis)
    torch.testing.assert_close(project(outside, basis), outside)


# --- the concept's tokens ---


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_tokens(family):
    found = model(family)
    embeds = encode_prompts(found, ["a striped star in a city"], SAMPLER).embeds[0].double()
    first = 2 if family == "sd" else 1  # CLIP's begin token
    own = {
        "concept": range(first, first + 2),
        "onwards": range(first, len(embeds)),
        "all": range(len(embeds)),
    }
    names = [
        "denoiser."
        + (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
            if family == "sd"
            else "context_embedder"
        )
    ]
    for tokens, rows in own.items():
        (basis,) = concept_subspaces(
            found, names, PROMPTS[:1], SAMPLER, torch.Generator(), tokens=tokens, energy=1.0
        ).values()
        expected = subspace(embeds[list(rows)], energy=1.0)
        assert basis.shape == expected.shape
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, atol=1e-6, rtol=0)


def test_sd3_holds_the_concept_in_both_encoders():
    found = model("sd3")
    (basis,) = bases(found, ["context_embedder"]).values()
    embeds = encode_prompts(found, [PROMPTS[1].text], SAMPLER).embeds[0].double()
    clip, t5 = embeds[2:4], embeds[16 + 1 : 16 + 3]
    for rows in (clip, t5):
        assert float(project(rows, basis).norm() / rows.norm()) < 1e-6
    assert float(project(embeds[:1], basis).norm() / embeds[:1].norm()) > 0.1


# --- variant A ---


class Toy:
    """A linear layer that learns another, by a LoRA of rank 4; 3 of its inputs' 64 directions are sensitive.

    The inputs' scales span a factor of 100, as text embeddings have few large entries.
    """

    def __init__(self):
        self.target, self.basis = normal(64, 64, seed=1).float() / 8, subspace(normal(3, 64, seed=2), 3)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
        self.scales = torch.logspace(0, -2, 64)[order]

    def leak(self, hooks, steps=500, optimiser=torch.optim.AdamW, lr=1e-2):
        down = nn.Parameter(normal(4, 64, seed=3).float() / 4)
        lora = {"denoiser.toy": LoraModule(nn.Linear(64, 64), down, nn.Parameter(torch.zeros(64, 4)), 1.0)}
        module = lora["denoiser.toy"]
        hooks.started(type("Training", (), {"lora": lora}))
        adam, draws = optimiser([module.A, module.B], lr=lr), torch.Generator().manual_seed(4)
        for step in range(steps):
            x = torch.randn(16, 64, generator=draws) * self.scales
            adam.zero_grad()
            (x @ (module.B @ module.A - self.target).T).square().mean().backward()
            with torch.no_grad():
                hooks.gradients(lora, step)
                adam.step()
                hooks.stepped(lora, step)
        tensors = {"lora.denoiser.toy.A": module.A.detach(), "lora.denoiser.toy.B": module.B.detach()}
        return leakage(tensors, {"denoiser.toy": self.basis})["denoiser.toy"]


class Started(EmbeddingProjection):
    """Start and gradients projected, the weights not: the research note's naive form."""

    def stepped(self, lora, step):
        pass


def test_adam_takes_projected_gradients_back_into_the_subspace():
    toy = Toy()
    subspaces = {"denoiser.toy": toy.basis}
    plain = toy.leak(TrainingHooks())
    naive = toy.leak(EmbeddingProjection(subspaces, gradients_only=True))
    started = toy.leak(Started(subspaces))
    whole = toy.leak(EmbeddingProjection(subspaces))
    slow = toy.leak(Started(subspaces), optimiser=torch.optim.SGD, lr=1e-1)
    print(
        f"leak: plain {plain:.3f}, gradients {naive:.3f}, and start {started:.3f}, whole {whole:.1e}, sgd {slow:.1e}"
    )
    assert plain > 0.15 and naive > 0.3 and started > 0.3
    assert whole < 1e-7 and slow < 1e-6


@pytest.mark.parametrize("family", BUILDERS)
def test_two_steps_hold_the_property_in_every_layer_that_is_claimed(family):
    found = model(family)
    targets = [*adapted(found), *TEXT_FED[family]]
    subspaces = bases(found, targets, dimension=6)  # fewer than the 16 inputs of SD3's layers
    result = train(found, EmbeddingProjection(subspaces), steps=2, lr=0.01, targets=targets)
    plain = train(found, steps=2, lr=0.01, targets=targets)
    kinds = {layer_kind(found.family, n) for n in subspaces}
    assert kinds == {"sd": {"embeddings"}, "sdxl": {"embeddings"}, "sd3": {"embeddings", "text"},
                     "flux": {"embeddings", "text", "joint"}}[family]  # fmt: skip
    claimed = {
        n
        for n in lora_targets(found, LoraSettings(targets=tuple(targets)))
        if layer_kind(found.family, n) != "image"
    }
    assert set(subspaces) == claimed
    deltas = lora_deltas(result.tensors)
    idle = {"denoiser.transformer_blocks.1.attn.add_q_proj"}  # SD3's last block doesn't use its text queries
    moved = {n for n in subspaces if bool(deltas[f"edit.{n}.weight"].any())}
    assert set(subspaces) - moved == (idle if family == "sd3" else set())
    assert max(leakage(result.tensors, subspaces).values()) < 1e-6
    assert min(leakage(plain.tensors, subspaces)[n] for n in moved) > 1e-2
    assert result.facts["projection"]["layers"] == len(subspaces)
    assert result.facts["projection"]["leak"] < 1e-6


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_sensitive_tokens_meet_the_base_models_layer(family):
    """Outputs of text-fed layers at the concept's tokens, with the trained LoRA on the model."""
    found = model(family)
    targets = ["attn2.to_k", "attn2.to_v"] if family == "sdxl" else ["context_embedder"]
    subspaces = bases(found, targets)
    tensors = train(found, EmbeddingProjection(subspaces), steps=4, lr=0.05, targets=targets).tensors
    embeds = encode_prompts(found, [PROMPTS[0].text], SAMPLER).embeds
    first = 2 if family == "sdxl" else 1
    for name in subspaces:
        layer = component(found, "denoiser").get_submodule(name.removeprefix("denoiser."))
        with torch.no_grad():
            base = layer(embeds)
            with applied_lora(found, tensors):
                change = (layer(embeds) - base).abs()[0].amax(dim=1)
        own = change[first : first + 2]
        others = torch.cat([change[:first], change[first + 2 :]])
        assert float(own.max()) < 1e-5 * float(others.max())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_whole_run_keeps_the_subspace_out(precision):
    found = model("sd3")
    targets, changes = ["add_k_proj", "context_embedder"], {"steps": 60, "lr": 0.02, "precision": precision}
    subspaces = {n: b[:, :6] for n, b in bases(found, targets).items()}
    kept = train(found, EmbeddingProjection(subspaces), targets=targets, **changes)
    naive = train(found, EmbeddingProjection(subspaces, gradients_only=True), targets=targets, **changes)
    plain = train(found, targets=targets, **changes)
    assert max(leakage(kept.tensors, subspaces).values()) < 1e-6
    for name in subspaces:
        leaks = [leakage(r.tensors, subspaces)[name] for r in (naive, plain)]
        assert leaks[0] > 0.3 * leaks[1] > 0.03
    delta = lora_deltas(kept.tensors)
    for name, basis in subspaces.items():
        update = delta[f"edit.{name}.weight"].double()
        for c in (basis @ normal(basis.shape[1], 5)).T:
            assert float((update @ c).norm() / (update.norm() * c.norm())) < 1e-6
            rounded = (update @ c.bfloat16().double()).norm()  # what a bfloat16 model feeds the layer
            assert 1e-5 < float(rounded / (update.norm() * c.norm())) < 2**-9


def test_a_share_of_each_step_is_taken_back():
    """With strength below 1 a step's change of A inside the subspace is (1 - strength) of Adam's."""
    basis = subspace(normal(3, 16), 3)
    down = nn.Parameter(normal(4, 16, seed=3).float())
    lora = {"denoiser.toy": LoraModule(nn.Linear(16, 8), down, nn.Parameter(torch.ones(8, 4)), 1.0)}
    hooks = EmbeddingProjection({"denoiser.toy": basis}, 0.75)
    start = down.detach().clone()
    hooks.started(type("Training", (), {"lora": lora}))
    torch.testing.assert_close(down.detach(), project(start, basis, 0.75))
    before, gradient = down.detach().clone(), normal(4, 16, seed=5).float()
    down.grad = gradient.clone()
    with torch.no_grad():
        hooks.gradients(lora, 0)
        torch.testing.assert_close(down.grad, project(gradient, basis, 0.75))
        step = normal(4, 16, seed=6).float()  # whatever the optimiser does
        down.add_(step)
        hooks.stepped(lora, 0)
    torch.testing.assert_close(down.detach(), before + project(step, basis, 0.75))


def test_strength_zero_is_plain():
    found = model("sd3")
    subspaces = bases(found, ["add_k_proj"])
    plain = train(found, targets=["add_k_proj"], steps=2)
    zero = train(found, EmbeddingProjection(subspaces, 0.0), targets=["add_k_proj"], steps=2)
    assert equal(zero.tensors, plain.tensors)


# --- subspaces of hidden states ---


def test_hidden_layers_get_the_subspace_of_their_own_inputs():
    """GPM: an image-fed layer's output on what it saw on sensitive images does not change."""
    found = model("flux")
    targets = ["to_q", "add_k_proj"]
    names = lora_targets(found, LoraSettings(targets=tuple(targets)))
    given = examples()[:1]
    subspaces = bases(found, targets, layers="all", examples=given, dimension=6)
    assert set(subspaces) == set(names)
    kinds = {n: layer_kind("flux", n) for n in names}
    assert sorted(kinds.values()) == ["image", "joint", "text"]
    rows = [[1, 2], [1, 2]]
    seen = _inputs(found, kinds, PROMPTS, rows, SAMPLER, torch.Generator().manual_seed(3), given, 2, True)
    sizes = {kinds[n]: len(x) for n, x in seen.items()}
    text, image, width = 2 * 2 * 2, 2 * 2 * 16, 32
    assert sizes["text"] == text and sizes["image"] == image
    assert sizes["joint"] in (text + image, width)  # as they are, or what a QR decomposition leaves
    for name, inputs in seen.items():
        expected = subspace(inputs, dimension=6)
        torch.testing.assert_close(subspaces[name] @ subspaces[name].T, expected @ expected.T)
    tensors = train(found, EmbeddingProjection(subspaces), targets=targets).tensors
    assert max(leakage(tensors, subspaces).values()) < 1e-6


@torch.no_grad()
def test_what_the_first_block_of_flux_sees_of_the_text_does_not_depend_on_the_image():
    """So that the guarantee of ``add_*_proj`` in the first block holds for other images at those timesteps."""
    found, seen = model("flux"), []
    layer = found.denoiser.transformer_blocks[0].attn.add_k_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    conditioning = replace(encode(found, [PROMPTS[0].text], SAMPLER), negative=None)
    for seed in (1, 2):
        latents = normal(1, 16, 16, seed=seed).float()
        prediction(found, latents, torch.tensor([500.0]), conditioning, SAMPLER)
    handle.remove()
    torch.testing.assert_close(seen[0], seen[1])


# --- variant B ---


class Seeing(GradientProjection):
    """Checks, at each step, gradient and change of weights against the basis."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.gradient_shares, self.change_shares, self.refreshes = [], [], []

    @staticmethod
    def flat(tensors):
        return torch.cat([t.detach().flatten() for t in tensors])

    def parameters(self, lora):
        return [p for m in lora.values() for p in (m.A, m.B)]

    def share(self, vector):
        return float((vector @ self._basis).norm() / vector.norm())

    def gradients(self, lora, step):
        before = self._refreshed
        self.weights = self.flat(self.parameters(lora))
        super().gradients(lora, step)
        self.gradient_shares.append(self.share(self.flat([p.grad for p in self.parameters(lora)])))
        self.refreshes += [step] if self._refreshed != before else []

    def stepped(self, lora, step):
        super().stepped(lora, step)
        self.change_shares.append(self.share(self.flat(self.parameters(lora)) - self.weights))


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_variant_b_projects_gradients_and_steps(family):
    found, pairs = model(family), examples()[:2]
    changes = {"targets": ["to_k"], "steps": 5, "caption_dropout": 0.0}
    hooks = Seeing(pairs, count=3, every=2, energy=1.0)
    result = train(found, hooks, **changes)
    assert hooks.refreshes == [0, 2, 4]
    assert max(hooks.gradient_shares) < 1e-4 and max(hooks.change_shares) < 1e-4
    assert result.facts["projection"]["dimension"] == 3
    naive = Seeing(pairs, count=3, every=2, energy=1.0, updates=False)
    train(found, naive, **changes)
    assert max(naive.gradient_shares) < 1e-4 and max(naive.change_shares) > 0.05
    off = train(found, GradientProjection(pairs, 0.0, updates=False), **changes)
    assert equal(off.tensors, train(found, **changes).tensors)


def test_variant_b_takes_the_sensitive_gradients():
    """Its basis spans the loss gradients of the sensitive pairs, by autograd on the same draws."""
    found, pairs = model("sd3"), examples()[:1]

    class Expected(GradientProjection):
        def gradients(self, lora, step):
            super().gradients(lora, step)
            training, parameters = self._training, [p for m in lora.values() for p in (m.A, m.B)]
            with torch.enable_grad():
                batch = training.noisy(training.latents(pairs), [training.draws("sensitive", step, 0)])
                embeds = training.conditioning([pairs[0].caption])
                loss = (training.predict(*batch[:2], embeds) - batch[2]).square().mean()
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            assert self._basis.shape == (len(gradient), 1)
            assert float((gradient @ self._basis[:, 0]).abs() / gradient.norm()) == pytest.approx(1, abs=1e-5)

    train(found, Expected(pairs, count=1), steps=1, targets=["add_k_proj"])


def test_variant_b_takes_all_pairs_by_turns():
    hooks = GradientProjection(examples()[:3], count=2, every=5)
    assert [hooks.place(step, n) for step in (0, 5, 10) for n in range(2)] == [0, 1, 2, 0, 1, 2]


class InterruptedByTest(Exception):
    pass


def dying(hooks, step):
    """The hooks, which stop the training in the middle of a step."""
    own = hooks.gradients

    def gradients(lora, at):
        own(lora, at)
        if at == step:
            raise InterruptedByTest

    hooks.gradients = gradients
    return hooks


@pytest.mark.parametrize("variant", ["a", "b"])
def test_projected_runs_resume_bit_for_bit(tmp_path, variant):
    found, changes = model("sd3"), {"targets": ["add_k_proj"], "steps": 6, "precision": "bf16"}
    subspaces = bases(found, ["add_k_proj"])

    def hooks():
        if variant == "a":
            return EmbeddingProjection(subspaces, 0.5)
        return GradientProjection(examples()[:1], count=2, every=5)  # taken at step 0, needed at step 4

    with pytest.raises(InterruptedByTest):
        train(found, dying(hooks(), 4), checkpoint=tmp_path, checkpoint_every=2, **changes)
    resumed = train(found, hooks(), checkpoint=tmp_path, **changes)
    assert equal(resumed.tensors, train(found, hooks(), **changes).tensors)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": "some"}, "tokens is one of concept, onwards, all, not 'some'"),
        ({"layers": "image"}, "layers is one of embeddings, text, all, not 'image'"),
        ({"layers": "embeddings"}, r"no adapted layer of \S* \(sd3\) is of layers='embeddings'"),
        ({"energy": 0.0}, "energy must be above 0"),
        ({"dimension": 0}, "dimension must be at least 1, not 0"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"examples": [replace(examples()[0], image=np.zeros((4, 4, 3), np.uint8))]}, "an image is uint8"),
    ],
)
def test_bad_subspaces(changes, says):
    with pytest.raises(UserError, match=says):
        bases(model(), ["add_k_proj"], **changes)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ((), "needs sensitive prompts"),
        ((SensitivePrompt("a red star", "robot"),), "'a red star' doesn't hold the words 'robot'"),
        ((SensitivePrompt("a red star", ""),), "doesn't hold the words ''"),
    ],
)
def test_bad_prompts(prompts, says):
    found = model()
    names = lora_targets(found, LoraSettings())
    with pytest.raises(UserError, match=says):
        concept_subspaces(found, names, prompts, SAMPLER, torch.Generator())


def test_bad_hooks():
    found, basis = model("sd"), torch.eye(16, dtype=torch.float64)[:, :2]
    for name, width in (
        ("denoiser.nowhere", 16),
        ("denoiser.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 7),
    ):
        with pytest.raises(UserError, match="fits no adapted layer"):
            train(found, EmbeddingProjection({name: basis[:width]}))
    with pytest.raises(UserError, match=r"strength must be in \[0, 1\], not 1.5"):
        EmbeddingProjection({}, 1.5)
    with pytest.raises(UserError, match="frozen text encoders"):
        train(found, EmbeddingProjection({}), text_encoder=True)
    with pytest.raises(UserError, match="needs sensitive images"):
        GradientProjection([])
    with pytest.raises(UserError, match="count and every must be at least 1, not 0 and 25"):
        GradientProjection(examples(), count=0)
