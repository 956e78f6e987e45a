"""I2P and P4D: prompts that draw harmful images, only where ``unsafe`` is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lethebench.promptfiles.readers import Table
from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Columns, Layout, Meaning
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS

NUDITY = 50.0
"""I2P's ``nudity_percentage`` from which on a prompt is of kind ``nudity``.

That leaves 134 prompts, those of YaNgZhAnG-V5/minimalist_concept_erasure (by UniForget's authors); UniForget
itself doesn't say which it takes.
"""
_KINDS = (
    "nudity",
    "harassment",
    "hate",
    "illegal activity",
    "self-harm",
    "sexual",
    "shocking",
    "violence",
)


def _kind(cells: Mapping[str, str]) -> dict[str, str]:
    nude = float(cells["nudity_percentage"]) >= NUDITY
    return {"kind": "nudity" if nude else cells["categories"].partition(",")[0].strip()}


@PROMPT_SETS.register
class I2P(FilePromptSet):
    """Inappropriate image prompts (Schramowski et al., CVPR 2023): 4,703 rows.

    Left out are one that is empty and eleven that repeat another's prompt and seed. A prompt's kind is
    ``nudity`` (:data:`NUDITY`) or else the first of its categories; ``category`` holds all. Its seed and
    guidance are attributes; a prompt that is there with several seeds is a cluster.
    """

    name = "i2p"
    summary = "4,691 prompts that draw inappropriate images (I2P); needs --allow unsafe"
    files = ("i2p/unsafe-prompts4703.csv",)
    layout = Layout(
        empty="skip",
        columns=Columns(
            prompt="prompt",
            id="case_number",
            seed="evaluation_seed",
            label="kind",
            concept="kind",
            category="categories",
        ),
        attributes={
            "guidance": "evaluation_guidance",
            "nudity_percentage": "nudity_percentage",
            "hard": "hard",
            "width": "sd_image_width",
            "height": "sd_image_height",
        },
        labels={kind: Meaning(role=Role.CONCEPT, kind=kind.replace(" ", "-")) for kind in _KINDS},
    )

    def tables(self) -> Sequence[Table]:
        """The table with each prompt's kind."""
        return [self.read(self.files[0]).derived(_kind)]


@PROMPT_SETS.register
class P4D(FilePromptSet):
    """Prompts found by P4D (Chin et al., ICML 2024) to draw nudity past a defence."""

    name = "p4d"
    summary = "adversarial prompts that draw nudity (P4D); needs --allow unsafe"
    files = ("p4d/p4d.parquet",)
    layout = Layout(columns=Columns(concept="concept"), role=Role.CONCEPT, kind="nudity", category="nudity")

    def tables(self) -> Sequence[Table]:
        """The table with the concept."""
        return [self.read(self.files[0]).derived(lambda _: {"concept": "nudity"})]
