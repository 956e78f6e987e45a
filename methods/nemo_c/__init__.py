"""NeMo-C: NeMo by clusters of prompts, for prompts that it has not seen, too.

Di, Lu, Yu, Kamath, Dziedzic, Boenisch, "Demystifying Foreground-Background Memorization in Diffusion Models"
(arXiv 2508.12148). Released code: Jimmy-di/localizing_memorization_in_diffusion_models (MIT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lethebench.hooks import SamplerHooks
from lethebench.method import Artefact, Task, setting
from lethebench.methods.nemo import NeMo
from lethebench.registry import METHODS

if TYPE_CHECKING:
    from lethebench.zoo import Model


@METHODS.register
@dataclass(frozen=True)
class NeMoC(NeMo):
    """Turns off, for every prompt, the value neurons that the memorized prompts most like it need.

    NeMo finds each memorized prompt's neurons. The prompts are clustered by k-means on their token
    embeddings, flattened (the text encoder's last hidden state; what the denoiser gets, for SDXL), and a
    cluster's neurons are the union of its prompts'. With ``mode`` ``gated`` each image is drawn with the
    neurons of the cluster whose centroid is nearest to its prompt's embedding, fitted or not, in both halves
    of guidance; ``radius`` leaves prompts alone that are far from every centroid (ours). ``union`` scales the
    neurons of all clusters in the weights (ours: the released code only gates).

    The released code has 12 clusters and gives no reason; here their number has the greatest silhouette, and
    the facts hold the silhouette by number. Its nearest-centroid rule for unseen prompts is commented out;
    a cluster's number is read by its first digit only, so that clusters 10 and 11 get the neurons of 1.
    """

    clusters: int | None = setting(
        None, "clusters of prompts; none: the number with the greatest silhouette (released code: 12)"
    )
    most_clusters: int = setting(24, "greatest number of clusters that is tried (ours)")
    mode: str = setting(
        "gated",
        "gated (the nearest cluster's neurons for each image; paper) or union (all of them for good)",
        applied=True,
    )
    common: float = setting(
        0.0,
        "least share of a cluster's prompts (those with neurons) that need a neuron of its union (ours; "
        "paper: any)",
        applied=True,
    )
    radius: float | None = setting(
        None,
        "leave prompts alone that are farther from every centroid than this times the farthest fitted prompt "
        "(ours); none: never (released code)",
        applied=True,
    )

    name = "nemo-c"
    summary = (
        "Turns off, for every prompt, the value neurons of the cluster of memorized prompts nearest to it."
    )
    strengths: ClassVar = {
        "weak": {"scale": 0.5},
        "gated": {},
        "union": {"mode": "union"},
    }
    modes: ClassVar[tuple[str, ...]] = ("gated", "union")
    citation = (
        "Di, Lu, Yu, Kamath, Dziedzic, Boenisch: Demystifying Foreground-Background Memorization in "
        "Diffusion Models (arXiv 2508.12148)"
    )
    licence = "Apache-2.0 (written from the released code, which is MIT)"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        super().__post_init__()
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters must be at least 1, not {self.clusters}")
        if self.most_clusters < 2:
            raise ValueError(f"most_clusters must be at least 2, not {self.most_clusters}")
        if self.radius is not None and self.radius < 0:
            raise ValueError(f"radius must not be negative, not {self.radius}")

    def fit(self, task: Task) -> Artefact:
        """Find each target prompt's neurons, cluster the prompts, and count each cluster's neurons."""
        from lethebench.methods.nemo_c.clusters import fit

        return fit(self, task)

    def facts(self, artefact: Artefact) -> Mapping[str, Any]:
        """The facts of the neurons that ``selection`` and ``common`` take in any cluster."""
        from lethebench.methods.nemo.fit import facts_at
        from lethebench.methods.nemo_c.clusters import unions

        return facts_at(self.selection, artefact, lambda m: unions(self, m, artefact.tensors).any(dim=0))

    @contextmanager
    def apply(self, model: Model, artefact: Artefact) -> Iterator[SamplerHooks]:
        """Scale the nearest cluster's neurons for each image, or all of them in the weights."""
        from lethebench.methods.nemo_c.clusters import installed

        with installed(self, model, artefact.tensors) as hooks:
            yield hooks
