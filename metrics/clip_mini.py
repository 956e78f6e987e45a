"""Text-image agreement: the cosine of the image and its prompt in the built-in dual encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lethebench.metric import Metric, Score, Shard
from lethebench.metrics._common import check_shard, check_vectors
from lethebench.prompts import Role
from lethebench.registry import METRICS

JUDGE = "clip-mini"


def cosines(images: NDArray[Any], texts: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each image embedding ``[n, d]`` with its text embedding ``[n, d]``: ``[n]``."""
    a, b = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return np.clip(found, -1.0, 1.0)


def _score(name: str, role: Role, help: str) -> Score:
    return Score(
        f"clip_mini.{name}",
        "clip_mini_score",
        "higher",
        "cosine",
        (-1.0, 1.0),
        roles=frozenset({role}),
        help=help,
        judge=JUDGE,
    )


@METRICS.register
class ClipMini(Metric):
    """The CLIP score's protocol (Hessel et al. 2021) by the built-in judge: no factor 2.5, no clipping at 0.

    Always against the prompt as the suite asks it: a method that changes the prompt's words is held to the
    original ones. Not comparable with CLIP's numbers.
    """

    name: ClassVar[str] = "clip-mini"
    summary: ClassVar[str] = "How well images show what their prompts ask for, by the built-in dual encoder."
    source: ClassVar[str] = "protocol of Hessel et al. 2021 (CLIPScore); encoder clip-mini (ours)"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "prompts"})
    scores: ClassVar[tuple[Score, ...]] = (
        _score("score", Role.NEUTRAL, "Cosine of image and prompt on neutral prompts."),
        _score(
            "trigger_score",
            Role.TRIGGER,
            "Cosine of image and prompt on trigger prompts: falls where suppressing breaks the model.",
        ),
        _score(
            "concept_score", Role.CONCEPT, "Cosine of image and prompt on prompts that ask for a character."
        ),
        _score("probe_score", Role.PROBE, "Cosine of image and prompt on near neighbours of the characters."),
    )

    detects: ClassVar[Mapping[str, Literal["high", "low"]] | None] = {}
    """Nobody claims that adherence tells what is memorized."""

    def __init__(self, judge: Any = None) -> None:
        self.judge = judge

    def measure(self, shard: Shard) -> Mapping[str, NDArray[Any]]:
        """``clip_mini_score``: the cosine with the prompt's own text."""
        check_shard(self.name, shard)
        if not len(shard):
            return {"clip_mini_score": np.zeros(0)}
        judge = self._judge()
        images, texts = judge.images(shard.images), judge.texts([p.text for p in shard.prompts])
        for name, found in (("image embeddings", images), ("text embeddings", texts)):
            check_vectors(self.name, name, found, len(shard))
        return {"clip_mini_score": cosines(images, texts)}

    def facts(self) -> dict[str, Any]:
        """The judge and the text that it compares with."""
        return {"judge": JUDGE, "text": "the suite's prompt, before any change by the method"}

    def _judge(self) -> Any:
        if self.judge is None:
            from lethebench import judges

            return judges.load("clip-mini")
        return self.judge
