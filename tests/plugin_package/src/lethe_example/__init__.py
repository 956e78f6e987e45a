"""A method in 20 lines: scale the prompt embedding towards the empty prompt's."""

from contextlib import contextmanager
from dataclasses import dataclass

from lethebench.hooks import SamplerHooks
from lethebench.method import Family, Method, setting


@dataclass(frozen=True)
class ShrinkEmbedding(Method):
    name = "shrink-embedding"
    summary = "moves the prompt embedding a share of the way to the empty prompt's"
    family = Family.SAMPLING
    citation = "an example plugin"
    strengths = {"weak": {"share": 0.1}, "medium": {"share": 0.3}, "strong": {"share": 0.6}}
    off = {"share": 0.0}

    share: float = setting(0.3, "how far to move, 0 (not at all) to 1 (the prompt is ignored)")

    @contextmanager
    def apply(self, model, artefact):
        yield _Shrink(self.share)


class _Shrink(SamplerHooks):
    def __init__(self, share):
        self.share = share

    def conditioning(self, conditioning, keys):
        if conditioning.negative is None:
            return conditioning
        empty = conditioning.negative.embeds
        return conditioning.with_embeds(conditioning.embeds.lerp(empty, self.share))
