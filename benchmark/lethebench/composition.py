"""Methods as they are named on the command line: one, or several composed with ``+``.

``ca+uniforget`` fits ``ca`` on the base model, then ``uniforget`` on the model with ``ca`` applied,
and applies both in that order. Of ``ca`` what it does to the weights and modules is there in the second
fit; hooks that act while sampling play no part in a fit. Knowledge, time and changed parameters add up; other
facts of the cost are the last part's that has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lethebench.errors import UserError
from lethebench.method import Artefact, Family, Knowledge, Method, configure, recorded_settings
from lethebench.prompts import Prompt
from lethebench.registry import METHODS, source_sha256

if TYPE_CHECKING:
    from lethebench.hooks import SamplerHooks
    from lethebench.zoo import Model


@dataclass(frozen=True)
class Recipe:
    """A (composed) method at one setting: the parts in order, each fully configured.

    ``specs`` are how each part was named (a registered name or a path), so that another process can
    load it again.
    """

    specs: tuple[str, ...]
    strengths: tuple[str, ...]
    parts: tuple[Method, ...]
    setting: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The parts' names, joined by ``+``."""
        return "+".join(p.name for p in self.parts)

    @property
    def knowledge(self) -> frozenset[Knowledge]:
        """All that any part may see."""
        return frozenset().union(*(p.sees for p in self.parts))

    @property
    def family(self) -> str:
        """The parts' families, joined by ``+`` without repeats."""
        order: dict[Family, None] = dict.fromkeys(p.family for p in self.parts)
        return "+".join(order)

    @property
    def control(self) -> bool:
        """Whether every part is a control."""
        return all(p.control for p in self.parts)

    @property
    def generates(self) -> bool:
        """Whether images need a denoiser."""
        return all(p.generates for p in self.parts)

    def config(self) -> dict[str, Any]:
        """Resolved settings by part, as a record shows them (of a path, its last name)."""
        return {p.name: recorded_settings(p) for p in self.parts}

    def sources(self) -> dict[str, str]:
        """The SHA-256 of each part's plugin source."""
        return {p.name: source_sha256(type(p)) for p in self.parts}

    def unsupported(self, model_family: str) -> str | None:
        """Why the recipe doesn't apply to a family of models, or None."""
        found = (part.unsupported(model_family) for part in self.parts)
        return next((reason for reason in found if reason), None)

    def substitute(self, prompt: Prompt, prompts: Mapping[str, Prompt]) -> Prompt:
        """The prompt to draw and score in place of ``prompt``."""
        for part in self.parts:
            prompt = part.substitute(prompt, prompts)
        return prompt

    @contextmanager
    def apply(self, model: Model, artefacts: Sequence[Artefact]) -> Iterator[list[SamplerHooks]]:
        """Apply the first ``len(artefacts)`` parts in order; undone in reverse at the end."""
        with ExitStack() as stack:
            yield [
                stack.enter_context(p.apply(model, a)) for p, a in zip(self.parts, artefacts, strict=False)
            ]


def recipes(
    spec: str,
    strength: str = "all",
    overrides: Mapping[str, Any] | None = None,
    suite_fit: Mapping[str, Any] | None = None,
) -> list[Recipe]:
    """The recipes of ``spec`` (``name``, ``path.py:Class`` or ``a+b``) at one strength or at all.

    At ``all``, the i-th recipe of a composition takes the i-th strength of each part (a part with
    fewer strengths stays at its last). ``overrides`` apply to the part that has such a setting;
    ``part.setting`` names it where several do. Raises UserError.
    """
    specs = tuple(spec.split("+"))
    classes = [METHODS.get(s) for s in specs]
    twice = [c.name for i, c in enumerate(classes) if c in classes[:i]]
    if twice:
        raise UserError(f"method '{twice[0]}' is named twice in '{spec}': a composition has each method once")
    if classes[0].follows:
        raise UserError(
            f"method '{classes[0].name}' works on what others changed: name one before it, "
            f"uniforget+{classes[0].name}"
        )
    if strength == "all":
        count = max(len(c.strengths) for c in classes)
        chosen = [[list(c.strengths)[min(i, len(c.strengths) - 1)] for c in classes] for i in range(count)]
    else:
        chosen = [_named(strength, classes)]
    given = _assign(overrides or {}, classes)
    found = []
    for names in chosen:
        parts = tuple(
            configure(c, n, {**(suite_fit or {}).get(c.name, {}), **given[c.name]})
            for c, n in zip(classes, names, strict=True)
        )
        label = names[0] if len(set(names)) == 1 else "+".join(names)
        extra = ",".join(f"{k}={v}" for k, v in sorted((overrides or {}).items()))
        setting = f"{label},{extra}" if extra else label
        found.append(Recipe(specs, tuple(names), parts, setting, dict(overrides or {})))
    return found


def _named(strength: str, classes: Sequence[type[Method]]) -> list[str]:
    names = strength.split("+")
    if len(names) == 1:
        names = [
            strength if strength in c.strengths or len(c.strengths) > 1 else next(iter(c.strengths))
            for c in classes
        ]
    if len(names) != len(classes):
        raise UserError(f"strength '{strength}' names {len(names)} parts, the method has {len(classes)}")
    return names


def _assign(overrides: Mapping[str, Any], classes: Sequence[type[Method]]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {c.name: {} for c in classes}
    for key, value in overrides.items():
        part, _, field = key.rpartition(".")
        owners = [c for c in classes if field in _settings(c) and part in ("", c.name)]
        if len(owners) != 1:
            known = sorted({f for c in classes for f in _settings(c)})
            problem = "names several parts" if owners else "is not a setting of the method"
            raise UserError(f"setting '{key}' {problem}: known {', '.join(known) or 'none'}")
        given[owners[0].name][field] = value
    return given


def _settings(cls: type[Method]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
