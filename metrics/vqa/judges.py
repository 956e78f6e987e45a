"""What every judge shares: its answers, how texts are read as yes or no, and how a suite names judges."""

from __future__ import annotations

import dataclasses
import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from lethebench.errors import UserError
from lethebench.metrics._common import Images, check_images

from .prevalence import Confusion, read_confusions

Verdict = Literal["yes", "no", "unusable"]


@dataclass(frozen=True)
class Answer:
    """What a judge said of one image.

    ``text`` is what it wrote, ``verdict`` how :func:`verdict` reads that. ``probability`` is the judge's own
    probability of yes, None where it gives none. ``tokens`` are (prompt, answer), None where nothing is
    counted; ``model`` is the exact model that a server says answered.
    """

    verdict: Verdict
    text: str
    probability: float | None = None
    tokens: tuple[int, int] | None = None
    model: str = ""


_FIRST = re.compile(r"[\s\W_]*(yes|no)(?![\w'’])(.*)", re.IGNORECASE | re.DOTALL)
_END = re.compile(r"[*_\"'”’)\]\s]*([.,;:!*\n–—]|(?<=\s)-|$)")
_SECOND = re.compile(r"[\s\W_]*(?:(?:and|or|but)\W+)?(yes|no)(?!\w)", re.IGNORECASE)
VERDICT = (
    "the answer's first word is yes or no, alone or before punctuation, and its opposite does not follow"
)


def verdict(text: str) -> Verdict:
    """``yes`` or ``no`` where the text begins with that word as its whole answer; else ``unusable`` (ours).

    The word stands alone or before punctuation, quoted or not, in any case; what follows may explain it but
    not be the opposite word. "No idea", "not sure", "yes and no" and a refusal are unusable, never no.

    >>> [verdict(t) for t in ("Yes.", "**No**, it does not.", "no idea", "Yes/No", "I can't help with that.")]
    ['yes', 'no', 'unusable', 'unusable', 'unusable']
    """
    found = _FIRST.match(text)
    if found is None:
        return "unusable"
    word, rest = found[1].lower(), found[2]
    if _END.match(rest) is None:
        return "unusable"
    second = _SECOND.match(rest)
    if second is not None and second[1].lower() != word:
        return "unusable"
    return "yes" if word == "yes" else "no"


@dataclass(frozen=True)
class Judge(ABC):
    """Answers questions about images. A subclass is a frozen dataclass: its fields are its settings.

    ``model`` is what stands behind the colon of its spec. ``name`` overrides the name in scores and columns.
    ``errors`` are its measured errors: a JSON file of :mod:`lethebench.metrics.vqa.error_rates`, or its
    content.
    """

    kind: ClassVar[str]
    counts: ClassVar[bool] = False
    """Whether it counts tokens."""
    model: str = ""
    name: str = ""
    errors: str | Mapping[str, Any] | None = None

    @property
    def slug(self) -> str:
        """The judge's name in scores: lower case, digits and ``_``."""
        return slug(self.name or self.model.rstrip("/").rsplit("/", 1)[-1] or self.kind)

    @property
    def spec(self) -> str:
        """How a suite names the judge: ``kind`` or ``kind:model``."""
        return f"{self.kind}:{self.model}" if self.model else self.kind

    def answer(self, images: Images, questions: Sequence[str]) -> list[Answer]:
        """One answer an image: ``images`` uint8 ``[n, height, width, 3]``, ``questions`` of length n.

        Order and batch don't change an answer. Raises ValueError for arrays of another form, UserError or
        RunError, in one line, where the judge can't answer.
        """
        check_images(f"vqa judge {self.spec}", images)
        if len(questions) != len(images):
            raise ValueError(f"vqa judge {self.spec}: {len(images)} images but {len(questions)} questions")
        for question in questions:
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"vqa judge {self.spec}: a question must be a text, got {question!r}")
        return self._answer(images, list(questions)) if len(images) else []

    @abstractmethod
    def _answer(self, images: Images, questions: list[str]) -> list[Answer]:
        """The answers, to input that is checked."""

    def check(self) -> None:
        """Raise UserError, saying what to do, if the judge can't answer here."""
        self.confusions()

    def files(self) -> dict[str, Path]:
        """Files that determine the answers, by name."""
        return {"errors": Path(self.errors)} if isinstance(self.errors, str) else {}

    def cost(self, answer: Answer) -> float:
        """What the answer cost, in US dollars; NaN where no price is known."""
        return float("nan")

    def confusions(self) -> dict[str, Confusion]:
        """The judge's measured errors by question (``acc_g``, ``acc_l``); one without is missing.

        Raises UserError for a file that can't be read.
        """
        return read_confusions(self.errors, f"vqa judge {self.spec}") if self.errors is not None else {}

    def facts(self) -> dict[str, Any]:
        """What a row records of the judge: kind, model and settings. Never a key."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "errors"}
        return {"kind": self.kind, **settings}


def slug(text: str) -> str:
    """A name for scores and columns.

    >>> slug("llava-v1.6_Vicuna 13B")
    'llava_v1_6_vicuna_13b'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


# --- from a suite's words to judges ---------------------------------------------------------------

KINDS = {
    "recogniser-mini": ("recogniser", "RecogniserJudge"),
    "transformers": ("local", "TransformersJudge"),
    "openai": ("server", "ServerJudge"),
}
_NEEDS = {"transformers": "a model's folder", "openai": "a model's name"}


def make_judges(given: Any) -> tuple[Judge, ...]:
    """The judges that a suite names: a comma-separated text, or a list of texts, mappings and judges.

    A mapping is ``{judge: <spec>, <setting>: <value>, ...}``. Raises UserError for an unknown kind or
    setting (with the near names), a judge that is named twice, or none.
    """
    entries = given.split(",") if isinstance(given, str) else given
    if isinstance(entries, (Mapping, Judge)):
        entries = [entries]
    if not isinstance(entries, Sequence) or not entries:
        raise UserError(f"vqa: judges={given!r} names no judge; known kinds: {', '.join(KINDS)}")
    judges = tuple(_make(entry) for entry in entries)
    slugs = [judge.slug for judge in judges]
    for name in slugs:
        if slugs.count(name) > 1:
            raise UserError(
                f"vqa: two judges have the name '{name}': give one of them another by `name: ...`"
            )
    return judges


def _make(entry: Any) -> Judge:
    if isinstance(entry, Judge):
        return entry
    settings = dict(entry) if isinstance(entry, Mapping) else {"judge": entry}
    spec = settings.pop("judge", None)
    if not isinstance(spec, str):
        raise UserError(
            f"vqa: {entry!r} names no judge: write 'recogniser-mini', 'openai:gpt-4o' or {{judge: ..., ...}}"
        )
    kind, _, model = spec.strip().partition(":")
    cls = _class(kind)
    if bool(model) is not (kind in _NEEDS):
        wanted = f"'{kind}:...' with {_NEEDS[kind]}" if kind in _NEEDS else f"'{kind}' alone"
        raise UserError(f"vqa: judge '{spec}' is not well formed: write {wanted}")
    known = [field.name for field in dataclasses.fields(cls) if field.name != "model"]
    for name in settings:
        if name not in known:
            raise UserError(f"vqa: judge '{spec}' has no setting '{name}': {_hint(str(name), known)}")
    made = cls(model=model, **settings)
    if not made.slug:
        raise UserError(f"vqa: judge '{spec}' has no name of letters or digits: give one by `name: ...`")
    return made


def _class(kind: str) -> type[Judge]:
    if kind not in KINDS:
        raise UserError(f"vqa: unknown judge kind '{kind}': {_hint(kind, list(KINDS))}")
    module, name = KINDS[kind]
    found: type[Judge] = getattr(import_module(f"lethebench.metrics.vqa.{module}"), name)
    return found


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def positive(judge: Judge, *names: str, whole: bool = False) -> None:
    """Raise UserError unless these settings are (whole) numbers above 0."""
    kinds, what = ((int,), "a whole number") if whole else ((int, float), "a number")
    for name in names:
        value = getattr(judge, name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            raise UserError(f"vqa judge {judge.spec}: {name}={value!r} must be {what} above 0")
