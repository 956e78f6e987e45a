"""The contract suite of methods.

A check is a function ``check_*(subject)`` that raises AssertionError with what is wrong. Which checks
apply follows from what the method declares.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethebench.check._common import (
    model_state,
    named_checks,
    random_states,
    same_model,
    same_random_states,
)
from lethebench.composition import Recipe, recipes
from lethebench.errors import KnowledgeError
from lethebench.hooks import ImageKey
from lethebench.method import (
    Artefact,
    Family,
    Knowledge,
    Method,
    Task,
    configure,
    fitted_settings,
    settings_of,
)
from lethebench.plan import prompt_set
from lethebench.prompts import PromptSet, Role
from lethebench.registry import METHODS
from lethebench.specs import SamplerSettings

if TYPE_CHECKING:
    from lethebench.zoo import Model

SUITE = "check@1"
_TRAINING = {"steps": 2, "batch_size": 2, "rank": 2}
"""The fine-tuning that training-time methods are checked in."""
_SAMPLER = SamplerSettings(scheduler="model", num_inference_steps=3, guidance_scale=3.0)


class Subject:
    """The method under check with a model, a prompt set and a quick fit, made once and shared."""

    def __init__(
        self, spec: str, model: Model, prompts: PromptSet, sampler: SamplerSettings = _SAMPLER
    ) -> None:
        self.spec, self.model, self.prompts, self.sampler = spec, model, prompts, sampler
        self.cls: type[Method] = METHODS.get(spec)

    @cached_property
    def method(self) -> Method:
        """The method at its weakest strength with its quick settings."""
        return configure(self.cls, next(iter(self.cls.strengths)), self.cls.quick)

    @cached_property
    def recipe(self) -> Recipe:
        """The same as a recipe."""
        return recipes(self.spec, next(iter(self.cls.strengths)), dict(self.cls.quick))[0]

    def fit(self, method: Method | None = None) -> Artefact:
        """Fit once more; another setting of the method where one is given."""
        method = method or self.method
        if method.family is not Family.TRAINING:
            return method.fit(Task(self.model, self.sampler, self.prompts, method.sees, seed_parts=(SUITE,)))
        prompts: Any = prompt_set("planted-train")
        height, width, _ = prompts.examples(prompts.instances[0])[0].image.shape
        task = Task(
            self.model,
            self.sampler.model_copy(update={"height": height, "width": width}),
            prompts,
            method.sees,
            seed_parts=(SUITE,),
            instance=prompts.instances[0],
            training=_TRAINING,
            control=method.control,
        )
        return method.fit(task)

    @cached_property
    def artefact(self) -> Artefact:
        """The fit that the checks share."""
        return self.fit()

    @cached_property
    def keys(self) -> list[ImageKey]:
        """A neutral and a trigger prompt, two images of each."""
        by_role = {p.role: p for p in reversed(list(self.prompts)) if p.role in (Role.NEUTRAL, Role.TRIGGER)}
        return [ImageKey(SUITE, p, k) for p in by_role.values() for k in range(2)]

    def draw(
        self, method: Method | None = None, artefact: Artefact | None = None, batch_size: int = 4
    ) -> Any:
        """The images of :attr:`keys` under the method; another setting of it, with its fit, where given."""
        from lethebench.sampler import sample

        with (method or self.method).apply(self.model, artefact or self.artefact) as hooks:
            return sample(self.model, self.keys, self.sampler, [hooks], batch_size=batch_size)

    def draw_base(self) -> Any:
        """The images of :attr:`keys` without the method."""
        from lethebench.sampler import sample

        return sample(self.model, self.keys, self.sampler, batch_size=4)


def check_declares_its_facts(subject: Subject) -> None:
    """Name, summary, family, knowledge and model families are declared with the right types."""
    cls = subject.cls
    assert isinstance(getattr(cls, "summary", None), str) and cls.summary, "declare a one-line `summary`"
    assert isinstance(getattr(cls, "family", None), Family), "declare `family` as a Family"
    assert all(isinstance(k, Knowledge) for k in cls.knowledge), "`knowledge` holds Knowledge values only"
    for strength in cls.strengths:
        undeclared = sorted(configure(cls, strength).sees - cls.knowledge)
        assert not undeclared, f"strength '{strength}' sees {', '.join(undeclared)}, which `knowledge` lacks"
    assert cls.model_families, "`model_families` is empty"
    left_out = sorted(Method.model_families - cls.model_families)
    assert not left_out or cls.unsupported_reason, (
        f"say in `unsupported_reason` why {', '.join(left_out)} are not supported"
    )
    assert cls.control or cls.citation, "declare a `citation`"


def check_constructor_only_stores(subject: Subject) -> None:
    """A frozen dataclass whose constructor keeps its arguments as they are."""
    cls = subject.cls
    if not dataclasses.is_dataclass(cls):
        assert cls.__init__ is object.__init__, "settings must be fields of a frozen dataclass"
        return
    assert cls.__dataclass_params__.frozen, "the dataclass must be frozen"  # type: ignore[attr-defined]
    for strength, values in cls.strengths.items():
        made = configure(cls, strength)
        for name, value in values.items():
            assert getattr(made, name) == value, f"strength '{strength}': the constructor changed `{name}`"


def check_settings_have_help(subject: Subject) -> None:
    """Every setting has help text."""
    if dataclasses.is_dataclass(subject.cls):
        for field in dataclasses.fields(subject.cls):
            assert field.metadata.get("help"), (
                f"setting `{field.name}` has no help: use lethebench.method.setting"
            )


def check_three_strengths(subject: Subject) -> None:
    """A method with a knob has at least three strengths, none of them twice."""
    cls = subject.cls
    if cls.control or not dataclasses.is_dataclass(cls) or not dataclasses.fields(cls):
        return
    assert len(cls.strengths) >= 3, f"{len(cls.strengths)} strengths: declare at least three, weakest first"
    seen = [settings_of(configure(cls, s)) for s in cls.strengths]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i]), "two strengths are the same setting"


def check_pickles(subject: Subject) -> None:
    """The method travels to another process (plugins given by path are found there by path)."""
    if not subject.cls.__module__.startswith("lethe_plugin_"):
        assert settings_of(pickle.loads(pickle.dumps(subject.method))) == settings_of(subject.method)


def check_knowledge_is_respected(subject: Subject) -> None:
    """``fit`` asks for nothing that isn't declared."""
    try:
        _ = subject.artefact
    except KnowledgeError as error:
        raise AssertionError(str(error)) from error


def check_fit_restores_the_model(subject: Subject) -> None:
    """``fit`` leaves the model's weights and hooks as they were."""
    before = model_state(subject.model)
    subject.fit()
    same_model(before, model_state(subject.model), "after fit")


def check_fit_is_deterministic(subject: Subject) -> None:
    """Two fits on the same task give the same artefact, bit for bit."""
    import torch

    first, second = subject.artefact, subject.fit()
    assert first.tensors.keys() == second.tensors.keys(), "two fits give different tensors"
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), f"two fits differ in tensor '{name}'"
    _same_facts(first, second, "two fits differ in fact '{}'")


def _same_facts(first: Artefact, second: Artefact, message: str) -> None:
    """Raise AssertionError where facts differ, but for what is under a key ``timing``."""
    one, other = _untimed(first.facts), _untimed(second.facts)
    for name in sorted(one.keys() | other.keys()):
        assert repr(one.get(name)) == repr(other.get(name)), message.format(name)


def _untimed(facts: Any) -> Any:
    if not isinstance(facts, dict):
        return facts
    return {name: _untimed(value) for name, value in facts.items() if name != "timing"}


def check_shared_fits_are_equal(subject: Subject) -> None:
    """Strengths that differ in settings declared ``applied`` alone have the same fit."""
    import torch

    seen: dict[str, Artefact] = {}
    methods = {s: configure(subject.cls, s, subject.cls.quick) for s in subject.cls.strengths}
    keys = [repr(sorted(fitted_settings(method).items())) for method in methods.values()]
    for (strength, method), key in zip(methods.items(), keys, strict=True):
        found = subject.artefact if method == subject.method else None
        if key in seen:
            told = (
                f"strength '{strength}' shares its fit with another (they differ in settings declared "
                "`applied` alone), but the fits differ in '{}': fit must not read such settings"
            )
            again = found or subject.fit(method)
            for name, tensor in seen[key].tensors.items():
                assert torch.equal(tensor, again.tensors[name]), told.format(name)
            _same_facts(seen[key], again, told)
        elif keys.count(key) > 1:
            seen[key] = found or subject.fit(method)


def check_artefact_round_trips(subject: Subject) -> None:
    """The artefact is the same after it was written and read."""
    import torch

    from lethebench.work import read_artefact, write_artefact

    with tempfile.TemporaryDirectory() as folder:
        write_artefact(subject.artefact, Path(folder), {}, settings_of(subject.method))
        again = read_artefact(Path(folder))
    assert again.facts == subject.artefact.facts, "the artefact's facts don't survive JSON"
    for name, tensor in subject.artefact.tensors.items():
        assert torch.equal(tensor.cpu(), again.tensors[name]), f"tensor '{name}' doesn't survive safetensors"


def check_base_is_restored(subject: Subject) -> None:
    """After ``apply``'s context the model is the base again, bit for bit, hooks included."""
    subject.draw_base()  # the first call puts transformers' own hooks on a text encoder
    before = model_state(subject.model)
    subject.draw()
    same_model(before, model_state(subject.model), "after apply's context closed")


def check_base_is_restored_after_an_error(subject: Subject) -> None:
    """The same where the work inside raises."""
    before = model_state(subject.model)
    try:
        with subject.method.apply(subject.model, subject.artefact):
            raise _Stop
    except _Stop:
        pass
    same_model(before, model_state(subject.model), "after an error inside apply's context")


def check_same_seed_same_images(subject: Subject) -> None:
    """The same images twice give the same pixels and latents."""
    first, second = subject.draw(), subject.draw()
    assert (first.images == second.images).all(), "the same keys give different images"
    assert (first.latents == second.latents).all(), "the same keys give different latents"


def check_images_dont_share(subject: Subject) -> None:
    """An image is the same, but for rounding, whichever others share its batch."""
    import numpy as np

    together, alone = subject.draw(), subject.draw(batch_size=1)
    apart = np.abs(together.latents - alone.latents).max(axis=(1, 2, 3), initial=0.0)
    scale = np.abs(alone.latents).max(initial=1.0)
    assert (apart <= 1e-3 * scale).all(), (
        f"latents differ by {apart.max():.3g} (of {scale:.3g}) when an image is drawn alone: "
        "something is shared by the images of a batch"
    )


def check_off_is_base(subject: Subject) -> None:
    """At the settings ``off`` the method draws what base draws, bit for bit."""
    assert subject.cls.off is not None, "declare `off`: the settings at which the method does nothing"
    off = configure(subject.cls, next(iter(subject.cls.strengths)), {**subject.cls.quick, **subject.cls.off})
    drawn, base = subject.draw(off, subject.fit(off)), subject.draw_base()
    assert (drawn.latents == base.latents).all(), f"the latents differ from base's at {dict(subject.cls.off)}"
    assert (drawn.images == base.images).all(), f"the images differ from base's at {dict(subject.cls.off)}"


def check_base_draws_as_before(subject: Subject) -> None:
    """Base draws the same before and after the method was in place: nothing global was changed."""
    before = subject.draw_base()
    subject.draw()
    assert (subject.draw_base().latents == before.latents).all(), "base draws otherwise after the method"


def check_leaves_global_random_state(subject: Subject) -> None:
    """Fitting and applying use no global random state."""
    before = random_states()
    subject.fit()
    subject.draw()
    same_random_states(before)


def check_composes(subject: Subject) -> None:
    """The method works inside another method's context, and both are undone."""
    from lethebench.sampler import sample

    other = configure(METHODS.get("random-tokens"), "weak")
    before = model_state(subject.model)
    outer = other.apply(subject.model, Artefact())
    with outer as first, subject.method.apply(subject.model, subject.artefact) as second:
        sample(subject.model, subject.keys[:1], subject.sampler, [first, second], batch_size=1)
    same_model(before, model_state(subject.model), "after a composition")


class _Stop(Exception):
    pass


_STATIC = (
    "declares_its_facts",
    "constructor_only_stores",
    "settings_have_help",
    "three_strengths",
    "pickles",
)
"""Checks that need no fit and no images."""


def checks() -> dict[str, Callable[[Subject], None]]:
    """Every check by its name without ``check_``, in the order of this file."""
    return named_checks(globals())


def applicable(subject: Subject, name: str) -> str | None:
    """Why a check doesn't apply, or None."""
    if name in _STATIC:
        return None
    if reason := subject.method.unsupported(subject.model.family):
        return reason
    if name == "off_is_base" and subject.cls.off is None:
        has_settings = dataclasses.is_dataclass(subject.cls) and bool(dataclasses.fields(subject.cls))
        if subject.cls.family is not Family.SAMPLING or not has_settings:
            return "the method declares no settings at which it does nothing"
    return None
