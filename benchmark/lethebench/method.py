"""The contract of a mitigation method, and the task that it is fitted on."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.errors import KnowledgeError, UserError
from lethebench.hooks import SamplerHooks
from lethebench.prompts import Prompt, PromptSet, Reference, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lethebench.finetuning.data import Attribute, Example
    from lethebench.finetuning.settings import LoraSettings
    from lethebench.specs import SamplerSettings
    from lethebench.zoo import Model


class Family(StrEnum):
    """When a method acts."""

    WEIGHTS = "weights"
    SAMPLING = "sampling"
    TRAINING = "training"


class Knowledge(StrEnum):
    """What a method may see of the task."""

    NEUTRAL_PROMPTS = "neutral-prompts"
    MEMORIZED_PROMPTS = "memorized-prompts"
    TRAINING_IMAGES = "training-images"
    CONCEPT_NAMES = "concept-names"
    REFERENCE_INDEX = "reference-index"


def setting(default: Any, help: str, *, place: bool = False, applied: bool = False) -> Any:
    """A field of a method's or metric's settings, with the help text that ``lethe info`` prints.

    ``applied`` says that only a method's ``apply`` reads the setting: strengths that differ in such settings
    alone share one stored fit.

    ``place`` says that the setting is where a file lies, which is the machine's own: records show its name
    only, and results don't depend on it (the file's SHA-256 stands for it: ``Metric.weights``).
    """
    if isinstance(default, (list, dict, set)):
        raise TypeError("the default of a setting must be immutable")
    return field(default=default, metadata={"help": help, "place": place, "applied": applied})


@dataclass
class Artefact:
    """What fitting a method gives: tensors, and facts that JSON can hold.

    Stored as safetensors and JSON. Facts that the row's cost reports, where they apply:
    ``sparsity`` (share of the masked elements that are off), ``parameters_changed`` (share of the
    model's parameters), ``deactivated`` (share by kind of mask).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Task:
    """What a method is fitted on. It holds only the method's declared knowledge.

    ``model`` and ``sampler`` are always there; anything else raises KnowledgeError unless the method
    declares it, so that the knowledge column of a row can be believed.
    """

    def __init__(
        self,
        model: Model,
        sampler: SamplerSettings,
        prompts: PromptSet,
        knowledge: frozenset[Knowledge],
        *,
        seed_parts: tuple[object, ...] = (),
        base: Callable[[], Model] | None = None,
        instance: str = "",
        training: Mapping[str, Any] | None = None,
        checkpoints: Path | None = None,
        control: bool = False,
        concepts: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.sampler = sampler
        self._prompts, self._knowledge, self._seed = prompts, knowledge, seed_parts
        self._base, self._instance, self._training, self._control = base, instance, training, control
        self._concepts = concepts
        self.checkpoints = checkpoints
        """Where a long fit may leave what it needs to go on after a kill; None: nowhere."""

    @property
    def training_seed(self) -> int:
        """The same for every training-time method on the suite, so that their rows are paired."""
        from lethebench.seeding import derive_seed

        return derive_seed("train", *self._seed[:1], self._instance)

    @property
    def training(self) -> LoraSettings:
        """How the suite fine-tunes. Raises UserError where it doesn't."""
        from lethebench.finetuning.settings import LoraSettings

        if self._training is None:
            raise UserError("the method trains, and the suite says nothing of training: use a train suite")
        return LoraSettings(**self._training)

    def training_set(self, *, twin: bool = False) -> Sequence[Example]:
        """What the model is fine-tuned on, of the instance at hand: a training-time method's own input.

        Which images hold a prohibited attribute (``Example.holds``) needs ``training-images``, which captions
        name one (``named``, ``plain_caption``) ``concept-names``: None without. ``twin`` gives the same
        images without the attribute, to a control alone (the oracle). Raises UserError where the prompt set
        has no training set, KnowledgeError where a method asks for the twin.
        """
        prompts: Any = self._prompts
        if not hasattr(prompts, "examples"):
            raise UserError(f"prompt set '{self._prompts.name}' has no training set: use a train suite")
        if twin and not self._control:
            raise KnowledgeError("the method asked for the twin set, which only a control may see")
        hidden: dict[str, Any] = {}
        if Knowledge.TRAINING_IMAGES not in self._knowledge:
            hidden |= {"holds": None}
        if Knowledge.CONCEPT_NAMES not in self._knowledge:
            hidden |= {"named": None, "plain_caption": None}
        return [dataclasses.replace(e, **hidden) for e in prompts.examples(self._instance, twin=twin)]

    def sensitive_prompts(self) -> list[str]:
        """Texts that name what must not be learnt. Needs ``concept-names``."""
        self._require(Knowledge.CONCEPT_NAMES)
        return list(self._optional("sensitive_prompts", self._instance) or ())

    def attributes(self) -> list[Attribute]:
        """What must not be learnt, by name. Needs ``concept-names``."""
        self._require(Knowledge.CONCEPT_NAMES)
        return list(self._optional("attributes", self._instance) or ())

    def _own(self) -> Iterator[Prompt]:
        """The prompts of the instance at hand: all where the set has none."""
        prompts: Any = self._prompts
        return (p for p in prompts if not self._instance or prompts.instance_of(p.id) == self._instance)

    def base(self) -> Model:
        """The unmitigated model: not ``model`` where the method follows others in a composition."""
        return self.model if self._base is None else self._base()

    def generator(self, *parts: object) -> torch.Generator:
        """A CPU generator for a named purpose: the only randomness that a method may use."""
        from lethebench.seeding import generator

        return generator("fit", *self._seed, *parts)

    def shared_generator(self, *parts: object) -> torch.Generator:
        """The same for every method on the suite: which targets are taken, say."""
        from lethebench.seeding import generator

        return generator("fit", *self._seed[:1], *parts)

    def neutral_prompts(self) -> Sequence[str]:
        """Neutral prompts for fitting, disjoint from the test prompts. Needs ``neutral-prompts``."""
        self._require(Knowledge.NEUTRAL_PROMPTS)
        return self._prompts.training_prompts()

    def memorized_prompts(self) -> list[Prompt]:
        """The prompts known to be memorized (role ``trigger``). Needs ``memorized-prompts``."""
        self._require(Knowledge.MEMORIZED_PROMPTS)
        return [p for p in self._own() if p.role is Role.TRIGGER]

    def concepts(self) -> dict[str, list[Prompt]]:
        """Protected concepts by name, with prompts that ask for them. Needs ``concept-names``.

        Where a model is fine-tuned, the prohibited attributes, with the prompts that methods may know.
        """
        self._require(Knowledge.CONCEPT_NAMES)
        if hasattr(self._prompts, "sensitive_prompts"):
            return {a.name: self._asking(a) for a in self.attributes()}
        found: dict[str, list[Prompt]] = {}
        for p in self._own():
            told = not self._concepts or p.concept in self._concepts
            if p.role is Role.CONCEPT and p.concept is not None and told:
                found.setdefault(p.concept, []).append(p)
        return found

    def _asking(self, attribute: Attribute) -> list[Prompt]:
        """The prompts that methods may know of a prohibited attribute."""
        name = re.compile(rf"\b{re.escape(attribute.name)}\b")
        texts = [text for text in self.sensitive_prompts() if name.search(text)]
        return [
            Prompt(f"{attribute.pair}-known-{i}", t, Role.CONCEPT, attribute.pair, concept=attribute.name)
            for i, t in enumerate(texts)
        ]

    def paraphrases(self, prompt: Prompt) -> list[str]:
        """Texts that ask for what ``prompt`` does without its trigger or its concept's name.

        Needs the knowledge of the prompt itself. Empty where the prompt set has none.
        """
        self._require(Knowledge.CONCEPT_NAMES if prompt.role is Role.CONCEPT else Knowledge.MEMORIZED_PROMPTS)
        if prompt.concept is not None and hasattr(self._prompts, "sensitive_prompts"):
            anchor = self.anchor_concept(prompt.concept)
            return [re.sub(rf"\b(the )?{re.escape(prompt.concept)}\b", anchor, prompt.text)]
        return list(self._optional("paraphrases", prompt.id) or ())

    def anchor_concept(self, concept: str) -> str:
        """What stands for the concept without its name ("a comic hero"); "" where the set doesn't say.

        Needs ``concept-names``.
        """
        self._require(Knowledge.CONCEPT_NAMES)
        return str(self._optional("anchor_concept", concept) or "")

    def _optional(self, name: str, *arguments: Any) -> Any:
        found = getattr(self._prompts, name, None)
        return None if found is None else found(*arguments)

    def training_images(self) -> dict[str, Reference]:
        """The memorized training images by reference id. Needs ``training-images``.

        Where a model is fine-tuned, all that it is fine-tuned on.
        """
        self._require(Knowledge.TRAINING_IMAGES)
        prompts: Any = self._prompts
        if hasattr(prompts, "examples"):
            ids = {e.id for e in prompts.examples(self._instance)}
        else:
            ids = {r for p in prompts if p.role in (Role.TRIGGER, Role.CONCEPT) for r in p.references}
        return {r: self._prompts.reference(r) for r in sorted(ids)}

    def _require(self, what: Knowledge) -> None:
        if what not in self._knowledge:
            declared = ", ".join(sorted(self._knowledge)) or "nothing"
            raise KnowledgeError(
                f"the method asked for {what}, but declares {declared}: add it to `knowledge`"
            )


class Method(ABC):
    """A mitigation method: a frozen dataclass of settings, plus facts declared on the class.

    The constructor only stores its arguments. Two things can be overridden: :meth:`fit`, which
    learns once, and :meth:`apply`, which puts the result on a model for as long as its context is
    open. See ``CONTRIBUTING.md`` for a method in 20 lines.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    family: ClassVar[Family]
    knowledge: ClassVar[frozenset[Knowledge]] = frozenset()
    model_families: ClassVar[frozenset[str]] = frozenset({"sd", "sdxl", "sd3", "flux"})
    """Model families that the method supports; on others its row says ``not-applicable``."""
    unsupported_reason: ClassVar[str] = ""
    """Why the other families are left out, as the row shows it after "supports ..., not ...: "."""
    strengths: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Settings by name, from the weakest to the strongest."""
    citation: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    control: ClassVar[bool] = False
    """A baseline that every table pins (base, blank, ...)."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Overrides that make a fit take seconds, for ``lethe check``."""
    off: ClassVar[Mapping[str, Any] | None] = None
    """Overrides at which the method does nothing ("strength zero"): ``lethe check`` sees that it then draws
    what base draws, bit for bit. A sampling-time method with settings must have them."""
    follows: ClassVar[bool] = False
    """Means something only after other methods in a composition (``retrain``)."""
    generates: ClassVar[bool] = True
    """False where no denoising is needed because the images don't depend on the model."""

    @property
    def sees(self) -> frozenset[Knowledge]:
        """What of ``knowledge`` these settings use: what the task holds and the row says. Default: all."""
        return self.knowledge

    def unsupported(self, model_family: str) -> str | None:
        """Why it doesn't apply to a family of models, or None. To extend where settings decide that too."""
        if model_family in self.model_families:
            return None
        reason = f": {self.unsupported_reason}" if self.unsupported_reason else ""
        return f"{self.name} supports {', '.join(sorted(self.model_families))}, not {model_family}{reason}"

    def fit(self, task: Task) -> Artefact:
        """Learn from the task, once. The result must depend only on settings and task."""
        return Artefact()

    def facts(self, artefact: Artefact) -> Mapping[str, Any]:
        """What the row's cost says of the artefact at these settings: by default what ``fit`` said.

        To override where settings that only ``apply`` reads decide how much is changed.
        """
        return artefact.facts

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Install the method on the model; the base model is restored when the context closes."""
        yield SamplerHooks()

    def substitute(self, prompt: Prompt, prompts: Mapping[str, Prompt]) -> Prompt:
        """The prompt to draw and score in place of ``prompt`` (controls only: ``oracle``)."""
        return prompt


def configure(cls: type[Method], strength: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The method at a named strength, with single settings overridden. Raises UserError."""
    if strength not in cls.strengths:
        raise UserError(f"method '{cls.name}' has no strength '{strength}': known {', '.join(cls.strengths)}")
    values = {**cls.strengths[strength], **(overrides or {})}
    fields: list[str] = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(
            f"method '{cls.name}' has no setting '{unknown[0]}': known {', '.join(fields) or 'none'}"
        )
    for name, value in values.items():
        check_type(f"method '{cls.name}'", cls, name, value)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"method '{cls.name}': {error}") from error


_PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}


def check_type(owner: str, cls: type, name: str, value: Any) -> None:
    """Raise UserError where a setting of a plain type (``int``, ``float | None``, ...) gets another."""
    declared = next(f.type for f in dataclasses.fields(cls) if f.name == name)  # type: ignore[arg-type]
    names = [part.strip() for part in str(getattr(declared, "__name__", declared)).split("|")]
    if not all(part in _PLAIN for part in names):
        return
    kinds = {_PLAIN[part] for part in names}
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and (type(value) in kinds or (type(value) is int and float in kinds)):
        return
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    wanted = " or ".join(["null" if k is type(None) else words[k] for k in map(_PLAIN.__getitem__, names)])
    raise UserError(f"{owner}: {name} is {wanted}, not {value!r}")


def settings_of(plugin: object) -> dict[str, Any]:
    """The resolved settings of a method or metric, as JSON can hold them."""
    return dataclasses.asdict(plugin) if dataclasses.is_dataclass(plugin) else {}  # type: ignore[arg-type]


def recorded_settings(plugin: object) -> dict[str, Any]:
    """The resolved settings as a record shows them: of a path, its last name only."""
    places = places_of(plugin)
    return {
        name: Path(value).name if name in places and value else _without_folders(value)
        for name, value in settings_of(plugin).items()
    }


def _without_folders(value: Any) -> Any:
    """The value with every absolute path in it (``transformers:/home/me/llava`` too) cut to its last name.

    >>> _without_folders(["recogniser-mini", {"judge": "transformers:/home/me/llava"}])
    ['recogniser-mini', {'judge': 'transformers:llava'}]
    """
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(part) for part in value]
    if not isinstance(value, str) or "://" in value:
        return value
    parts = (
        [part.strip().rpartition(":") for part in value.split(",")]
        if "," in value
        else [value.rpartition(":")]
    )
    cut = [kind + colon + (Path(rest).name if _is_path(rest) else rest) for kind, colon, rest in parts]
    return ",".join(cut)


def _is_path(text: str) -> bool:
    return Path(text).is_absolute() or text.startswith("~")


def identity_of(plugin: object) -> dict[str, Any]:
    """The resolved settings that determine results: all but places."""
    places = places_of(plugin)
    return {name: value for name, value in settings_of(plugin).items() if name not in places}


def fitted_settings(plugin: object) -> dict[str, Any]:
    """The resolved settings that determine a method's fit: no places, none that only ``apply`` reads."""
    applied = _marked(plugin, "applied")
    return {name: value for name, value in identity_of(plugin).items() if name not in applied}


def places_of(plugin: object) -> set[str]:
    """The settings that say where a file lies."""
    return _marked(plugin, "place")


def _marked(plugin: object, mark: str) -> set[str]:
    fields: tuple[Any, ...] = dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ()
    return {f.name for f in fields if f.metadata.get(mark)}
