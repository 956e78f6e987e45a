"""Ren: attention to the begin token raised, tokens after the prompt masked, while sampling.

Ren, Li, Zeng, Xu, Lyu, Xing, Tang, "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models
through Cross Attention", ECCV 2024 (arXiv 2403.11052). Released code: renjie3/MemAttn (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Family, Knowledge, Method, Task, setting
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class Ren(Method):
    """Draws attention away from the tokens that recall a memorized image, at every step and layer.

    - The logit l of the begin token is raised before the softmax, for the conditional predictions. Released
      code: c1 * l (``form`` ``multiply``), which lowers the attention where l is negative. Ours, the default:
      l + (c1 - 1) |l|, the same where l is positive.
    - The tokens after the prompt are masked, for the conditional and the unconditional predictions alike, at
      the prompt's length in both, as the released code does.

    In the paper most of the attention goes to the begin token, unless the prompt is memorized. A small text
    encoder need not have that: in ``mini-sd`` the begin token gets 1 to 12 % of it, l is negative for 10 to
    75 % of the queries, layer by layer, and c1 shows an effect from about 2. ``fit`` measures this on neutral
    prompts, for the record: facts ``begin_logit``, by layer its ``mean``, ``absolute`` (mean of the absolute
    value) and ``negative`` (share of queries with l below 0). ``apply`` needs none of it.

    Joint attention (ours; the paper has cross-attention only): the text tokens after the prompt are masked as
    keys for every query, so that the result is the one without these tokens. In SD 3 they are those of the
    CLIP part and those of the T5 part; l is that of the CLIP part's begin token, raised for the image's
    queries. T5 has no begin token, so that in FLUX there is nothing for ``c1`` to raise: strengths with it
    do not apply there, and ``mask`` (with ``mask=summary`` as a setting) is left. Pooled embeddings are left
    alone.

    Released code: one image a batch, 77 tokens and 8 heads written into it. The training-time mitigation of
    the paper isn't there.
    """

    c1: float = setting(
        1.25, "factor on the begin token's logit, 1 for none (paper: 1.25, tried 1.1 to 1.5)", applied=True
    )
    mask: str = setting(
        "padding",
        "none, padding (all after the end token; released command), summary (end token, too: its option)",
        applied=True,
    )
    form: str = setting(
        "raise", "raise: l + (c1 - 1) |l| (ours), or multiply: c1 l (released code)", applied=True
    )
    prompts: int = setting(8, "neutral prompts that the begin token's logit is measured on (ours)")

    name = "ren"
    summary = "Raises cross-attention to the begin token and masks the tokens after the prompt."
    family = Family.SAMPLING
    knowledge = frozenset({Knowledge.NEUTRAL_PROMPTS})
    strengths: ClassVar = {
        "scale": {"mask": "none"},
        "mask": {"c1": 1.0},
        "weak": {"c1": 1.1},
        "medium": {},
        "strong": {"c1": 1.5},
        "summary": {"mask": "summary"},
    }
    quick: ClassVar = {"prompts": 2}
    off: ClassVar = {"c1": 1.0, "mask": "none"}
    masks: ClassVar[tuple[str, ...]] = ("none", "padding", "summary")
    forms: ClassVar[tuple[str, ...]] = ("raise", "multiply")
    citation = (
        "Ren, Li, Zeng, Xu, Lyu, Xing, Tang: Unveiling and Mitigating Memorization in Text-to-image "
        "Diffusion Models through Cross Attention. ECCV 2024. arXiv:2403.11052"
    )
    licence = "Apache-2.0 (written from the paper; released code: MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not 1 <= self.c1 < float("inf"):
            raise ValueError(f"c1 is 1 or more, not {self.c1}")
        if self.mask not in self.masks:
            raise ValueError(f"mask is {', '.join(self.masks[:-1])} or {self.masks[-1]}, not '{self.mask}'")
        if self.form not in self.forms:
            raise ValueError(f"form is {' or '.join(self.forms)}, not '{self.form}'")
        if self.prompts < 1:
            raise ValueError(f"prompts must be at least 1, not {self.prompts}")

    def unsupported(self, model_family: str) -> str | None:
        """Why it doesn't apply: by family, and on FLUX with a ``c1`` that would do nothing."""
        if model_family == "flux" and self.c1 != 1:
            return (
                "ren raises the attention to CLIP's begin token by c1, and FLUX attends to T5's tokens, "
                "which have none: give c1=1 (strength mask), which leaves the masks"
            )
        return super().unsupported(model_family)

    def fit(self, task: Task) -> Artefact:
        """Measure the begin token's logit while neutral prompts are drawn. No tensors."""
        from lethebench.methods.ren.measure import begin_logits

        return Artefact(facts={"begin_logit": begin_logits(task, self.prompts)})

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Change the attention while the context is open, in calls with the arguments that the hooks give."""
        from lethebench.methods.ren.attention import FORMS, changed_attention
        from lethebench.methods.ren.hooks import RenHooks

        hooks = RenHooks(self.c1, self.mask)
        if hooks.idle:  # a mask of nothing takes another attention kernel, which rounds otherwise
            yield hooks
            return
        with changed_attention(model, FORMS[self.form]):
            yield hooks
