"""Targets, editable parameters, groups of parameters, and the pieces of a denoising loss."""

import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.datasets.planted import PlantedWorld
from lethebench.errors import KnowledgeError, UserError
from lethebench.hooks import ImageKey
from lethebench.method import Knowledge, Task
from lethebench.prompts import Prompt, Role
from lethebench.sampler import sample, unpack_latents
from lethebench.specs import SamplerSettings
from lethebench.unlearning import (
    applied,
    draw_latents,
    editable,
    encode,
    find_targets,
    fitting_settings,
    noised,
    parameter_group,
    prediction,
    require_anchors,
    training_target,
)
from lethebench.unlearning.edits import parameter
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
WORLD = PlantedWorld()
BOTH = frozenset({Knowledge.MEMORIZED_PROMPTS, Knowledge.CONCEPT_NAMES})


@pytest.fixture(params=list(BUILDERS))
def model(request):
    return wrap(BUILDERS[request.param]())


def task(knowledge=BOTH, method="m", prompts=WORLD):
    return Task(None, SETTINGS, prompts, knowledge, seed_parts=("suite@1", method))


# --- targets ---


def test_targets_are_the_memorized_prompts_and_the_concepts():
    found = {which: find_targets(task(), which) for which in ("triggers", "concepts", "all")}
    ids = {which: [t.id for t in targets] for which, targets in found.items()}
    assert set(ids["triggers"]) == {p.id for p in WORLD if p.role is Role.TRIGGER}
    assert set(ids["concepts"]) == {p.id for p in WORLD if p.role is Role.CONCEPT}
    assert ids["all"] == ids["triggers"] + ids["concepts"]
    assert all((t.concept is None) == (t.role is Role.TRIGGER) for t in found["all"])


def test_anchors_hold_no_planted_name():
    names = {name for item in WORLD.items for name in item.names}
    for target in find_targets(task()):
        assert target.anchors and target.text not in target.anchors
        assert len(set(target.anchors)) == len(target.anchors)
        for anchor in target.anchors:
            assert not names & set(anchor.replace(",", " ").split())
    tokens = set(" ".join(WORLD.vocabulary_captions()).replace(",", " ").split())
    anchors = {w for t in find_targets(task()) for a in t.anchors for w in a.replace(",", " ").split()}
    assert anchors <= tokens


def test_anchors_state_what_the_prompt_states():
    words = {"verbatim": ("object", "colour", "pattern"), "one-to-many": ("object",)}
    for target in find_targets(task(), "triggers"):
        prompt = WORLD.prompt(target.id)
        for name in words.get(prompt.kind, ()):
            assert all(prompt.attributes[name] in anchor.split() for anchor in target.anchors)
    for target in find_targets(task(), "concepts"):
        assert target.anchors == (target.text.replace(target.concept, target.anchor_concept),)


def test_a_longer_list_of_targets_contains_the_shorter_for_every_method():
    sets = [{t.cluster for t in find_targets(task(method=m), "concepts", n)} for n in (1, 4, 9) for m in "ab"]
    assert [len(s) for s in sets] == [1, 1, 4, 4, 9, 9]
    assert sets[0] == sets[1] <= sets[2] == sets[3] <= sets[4] == sets[5]
    whole = [t for t in find_targets(task(), "concepts") if t.cluster in sets[4]]
    assert whole == find_targets(task(), "concepts", 9)
    assert len({t.concept for t in whole}) == 9


def test_targets_need_their_knowledge():
    for which, known in (("triggers", Knowledge.CONCEPT_NAMES), ("concepts", Knowledge.MEMORIZED_PROMPTS)):
        with pytest.raises(KnowledgeError):
            find_targets(task(frozenset({known})), which)
    only = find_targets(task(frozenset({Knowledge.MEMORIZED_PROMPTS})), "triggers")
    assert only and all(t.concept is None for t in only)


class Plain:
    """A prompt set without paraphrases."""

    name = "plain"

    def __iter__(self):
        return iter([Prompt("a", "a red star", Role.TRIGGER, "a")])


class Empty(Plain):
    def __iter__(self):
        return iter([Prompt("a", "a red star", Role.NEUTRAL, "a")])


@pytest.mark.parametrize(
    ("which", "count", "prompts", "error", "message"),
    [
        ("everything", 0, WORLD, ValueError, "targets is triggers, concepts, all, not 'everything'"),
        ("all", -1, WORLD, ValueError, "count must be a whole number, 0"),
        ("concepts", 25, WORLD, UserError, "count is 25, but there are only 24"),
        ("all", "x", WORLD, ValueError, "count must be a whole number, 0"),
        ("triggers", 0, Empty(), UserError, "no triggers to unlearn"),
    ],
)
def test_bad_targets(which, count, prompts, error, message):
    with pytest.raises(error, match=message):
        find_targets(task(prompts=prompts), which, count)


def test_a_set_without_paraphrases_gives_targets_without_anchors():
    targets = find_targets(task(prompts=Plain()), "triggers")
    assert [(t.text, t.anchors) for t in targets] == [("a red star", ())]
    with pytest.raises(UserError, match=r"no paraphrase of 'a red star' \(1 of 1 prompts\)"):
        require_anchors(targets)
    require_anchors(find_targets(task()))


# --- edits ---


def test_an_edit_is_kept_as_differences_and_put_on_again(model):
    names = parameter_group(model, "text-projections") + parameter_group(model, "embedding")[:1]
    state = {n: parameter(model, n).detach().clone() for n in names}
    with editable(model, names) as edit:
        with torch.no_grad():
            edit.parameters[names[0]].mul_(1.5)
            edit.parameters[names[-1]][0] += 1
        changed = {n: p.detach().clone() for n, p in edit.parameters.items()}
        tensors, facts = edit.changes(), edit.facts()
        assert all(p.requires_grad for p in edit.parameters.values()) and torch.is_grad_enabled()
    assert set(tensors) == {f"edit.{names[0]}", f"edit.{names[-1]}"}
    entries = int((state[names[0]] != 0).sum()) + state[names[-1]].shape[1]
    assert facts["changed_entries"] == entries and 0 < facts["parameters_changed"] < 1
    for share in (1.0, 0.5, 0.0):
        with applied(model, tensors, share):
            for name in names:
                wanted = state[name] + share * (changed[name] - state[name])
                assert torch.allclose(parameter(model, name), wanted, atol=1e-6)
                assert share or torch.equal(parameter(model, name), state[name])
        assert all(torch.equal(parameter(model, n), state[n]) for n in names)
    assert not any(parameter(model, n).requires_grad for n in names)


def test_an_edit_is_undone_after_an_error(model):
    name = parameter_group(model, "full")[0]
    before = parameter(model, name).detach().clone()
    with pytest.raises(RuntimeError), editable(model, [name]) as edit:
        edit.parameters[name].data.zero_()
        raise RuntimeError
    assert torch.equal(parameter(model, name), before) and parameter(model, name).grad is None


def test_unknown_parameters(model):
    for name in ("denoiser.nothing.weight", "vae.x", "text_encoder_9.x"):
        with pytest.raises(KeyError, match="has no"):
            parameter(model, name)


def test_groups(model):
    full = parameter_group(model, "full")
    assert len(full) == len(list(model.denoiser.named_parameters()))
    kv, attention = parameter_group(model, "cross-attn-kv"), parameter_group(model, "attn")
    assert set(kv) < set(attention) < set(full)
    assert all(n.split(".")[-2] in ("to_k", "to_v", "add_k_proj", "add_v_proj") for n in kv)
    blocks = {n.partition(".")[2].rpartition(".to_" if ".to_" in n else ".add_")[0] for n in kv}
    assert len(kv) == 2 * len(blocks) and all(
        model.denoiser.get_submodule(b).to_q is not None for b in blocks
    )
    assert [parameter(model, n).shape[1] for n in parameter_group(model, "embedding")] == [
        e.config.hidden_size if hasattr(e.config, "hidden_size") else e.config.d_model
        for e in model.text_encoders
    ]
    with pytest.raises(UserError, match="unknown group of parameters 'head'"):
        parameter_group(model, "head")


def test_text_projections_take_the_embeddings(model):
    """The layers that a prompt's embeddings enter: their inputs are as wide as an embedding."""
    conditioning = encode(model, ["a red star"], SETTINGS)
    widths = {conditioning.embeds.shape[-1]}
    if conditioning.pooled is not None:
        widths.add(conditioning.pooled.shape[-1])
    found = {parameter(model, n).shape[1] for n in parameter_group(model, "text-projections")}
    assert found <= widths and conditioning.embeds.shape[-1] in found


# --- the pieces of a denoising loss ---


def test_noise_levels_are_the_schedulers_own(model):
    """Against diffusers' ``add_noise`` (``scale_noise`` for flow matching)."""
    draws = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=draws) for _ in range(2))
    scheduler = type(model.pipe.scheduler).from_config(model.pipe.scheduler.config)
    if model.family in ("sd3", "flux"):
        times = scheduler.timesteps[[10, 500, 900]]
        expected = scheduler.scale_noise(latents, times, noise)
        target = noise - latents
    else:
        from diffusers import DDPMScheduler

        times = torch.tensor([0, 500, 999])
        expected = DDPMScheduler.from_config(scheduler.config).add_noise(latents, noise, times)
        target = noise
    assert torch.allclose(noised(model, latents, noise, times), expected, atol=1e-5)
    assert torch.equal(training_target(model, latents, noise, times), target)


def test_velocity_is_the_schedulers_own():
    from diffusers import DDPMScheduler

    model = wrap(tiny_sd(prediction_type="v_prediction"))
    draws = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=draws) for _ in range(2))
    times = torch.tensor([3, 700])
    expected = DDPMScheduler.from_config(model.pipe.scheduler.config).get_velocity(latents, noise, times)
    assert torch.allclose(training_target(model, latents, noise, times), expected, atol=1e-6)


def test_prediction_takes_a_timestep_for_each_image(model):
    settings = fitting_settings(SETTINGS, model.family, 2, 1.0)
    texts = ["a red star", "a blue robot in a city"]
    draws = torch.Generator().manual_seed(0)
    latents = draw_latents(model, texts, settings, draws)
    conditioning = encode(model, texts, settings)
    with torch.no_grad():
        both = prediction(model, latents, torch.tensor([900, 300]), conditioning, settings)
        for i, time in enumerate((900, 300)):
            alone = encode(model, texts[i : i + 1], settings)
            one = prediction(model, latents[i : i + 1], torch.tensor([time]), alone, settings)
            assert torch.allclose(both[i : i + 1], one, atol=1e-4)


def test_drawn_latents_are_the_samplers_in_any_batch(model):
    """Each text's latents depend on its place, not on the batch's size; they are those of ``sample``."""
    settings = fitting_settings(SETTINGS, model.family, 3, None)
    texts = ["a red star", "a blue robot", "a red star"]

    def drawn(size):
        return draw_latents(model, texts, settings, torch.Generator().manual_seed(3), size)

    whole = drawn(3)
    assert torch.allclose(drawn(2), whole, atol=1e-4) and torch.allclose(drawn(1), whole, atol=1e-4)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    keys = [ImageKey(f"draw-{seed}", Prompt(str(i), t, Role.NEUTRAL, ""), 0) for i, t in enumerate(texts)]
    expected = torch.from_numpy(sample(model, keys, settings).latents)
    assert torch.allclose(unpack_latents(model, whole, settings), expected, atol=1e-4)
