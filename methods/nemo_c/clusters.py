"""Clusters of prompts with their neurons: found, and put on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lethebench.errors import UserError
from lethebench.hooks import Conditioning, ImageKey, SamplerHooks
from lethebench.method import Artefact, Task
from lethebench.methods.nemo.fit import common, localize, mask_facts, packed, unpacked
from lethebench.methods.nemo.neurons import Scaling, ValueNeurons, factors_of, scaled_for_good, scaling

if TYPE_CHECKING:
    from lethebench.methods.nemo_c import NeMoC
    from lethebench.zoo import Model

SLACK = 1e-4
"""What a distance may be off, relatively: a prompt's embedding differs by rounding from batch to batch."""


def fit(method: NeMoC, task: Task) -> Artefact:
    """NeMo-C's artefact: NeMo's masks, each prompt's cluster ``[targets]``, the centroids
    ``[clusters, tokens * width]``, and ``radius``, the distance of the prompt farthest from its centroid.
    """
    found = localize(method, task)
    points = found.embeds.flatten(1).float().cpu()
    seed = int(torch.randint(2**31 - 1, (1,), generator=task.generator("nemo-c", "k-means")))
    labels, silhouettes = clustered(method, points, seed)
    centroids = torch.stack([points[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)])
    nearest = torch.cdist(points, centroids).amin(dim=1)
    whole = torch.stack([found.masks[labels == c].any(dim=0) for c in range(len(centroids))])
    facts: dict[str, Any] = {
        **found.facts,
        **mask_facts(found.neurons, whole),
        "prompt_clusters": len(centroids),
        "prompts_by_cluster": torch.bincount(labels).tolist(),
        "neurons_by_cluster": whole.sum(dim=1).tolist(),
        "silhouette": silhouettes,
        "radius": round(float(nearest.max()), 4),
    }
    tensors = {
        **packed(found.neurons, found.masks, found.initial),
        "cluster": labels,
        "centroids": centroids,
        "radius": nearest.max().reshape(1),
    }
    return Artefact(tensors, facts)


def clustered(method: NeMoC, points: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
    """Cluster of each of ``points`` ``[n, d]`` by k-means, int64 ``[n]``; silhouette by number of clusters.

    The number with the greatest silhouette (the smaller of two equal ones), or the setting's. Raises
    UserError for more clusters than points.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    values = points.double().numpy()
    distinct = len(np.unique(values, axis=0))
    if method.clusters is not None and method.clusters > distinct:
        raise UserError(
            f"{method.name}: {method.clusters} clusters of {distinct} prompts: "
            f"set clusters to {distinct} or less"
        )
    tried = [method.clusters] if method.clusters else range(2, min(method.most_clusters, distinct - 1) + 1)
    found: dict[int, Any] = {1: np.zeros(len(values), dtype=np.int64)}
    silhouettes: dict[str, float] = {}
    for number in tried:
        made = KMeans(number, n_init=10, max_iter=500, random_state=seed).fit(values)
        found[number] = made.labels_
        if 1 < number < len(values):
            silhouettes[str(number)] = round(float(silhouette_score(values, made.labels_)), 4)
    best = method.clusters or int(max(silhouettes, key=silhouettes.__getitem__, default="1"))
    return torch.from_numpy(found[best].astype(np.int64)), silhouettes


def unions(method: NeMoC, masks: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The neurons of each cluster, bool ``[clusters, total]``, of the prompts' masks ``[targets, total]``."""
    labels, count = tensors["cluster"].cpu(), len(tensors["centroids"])
    return torch.stack([common(masks[labels == c], method.common) for c in range(count)])


class Gated(SamplerHooks):
    """Scales, for each image, the neurons of the cluster nearest to its prompt's embedding."""

    def __init__(self, scaler: Scaling, factors: Tensor, centroids: Tensor, radius: float | None) -> None:
        self.scaler, self.factors, self.centroids, self.radius = scaler, factors, centroids, radius

    def conditioning(self, conditioning: Conditioning, keys: tuple[ImageKey, ...]) -> Conditioning:
        """The factors of the nearest centroid; 1 for an embedding beyond the radius of every one.

        Raises UserError where another method changed the number of tokens.
        """
        points = conditioning.embeds.flatten(1).float().cpu()
        if points.shape[1] != self.centroids.shape[1]:
            raise UserError(
                f"nemo-c was fitted on embeddings of {self.centroids.shape[1]} numbers, these have "
                f"{points.shape[1]}: put it before the method that changes the number of tokens"
            )
        exact = "donot_use_mm_for_euclid_dist"  # a row's distances don't depend on the other rows
        nearest, cluster = torch.cdist(points, self.centroids, compute_mode=exact).min(dim=1)
        factors = self.factors[cluster]
        if self.radius is not None:
            factors = torch.where((nearest <= self.radius)[:, None], factors, 1.0)
        return self.scaler.marked(conditioning, factors)


@contextmanager
def installed(method: NeMoC, model: Model, tensors: Mapping[str, Tensor]) -> Iterator[SamplerHooks]:
    """NeMo-C on a model while the context is open."""
    neurons = ValueNeurons(model, up_blocks=method.up_blocks)
    centroids = tensors["centroids"].float().cpu()
    clusters = unions(method, unpacked(method, neurons, tensors), tensors)
    if method.mode == "union":
        with scaled_for_good(neurons, factors_of(clusters.any(dim=0), method.scale)):
            yield SamplerHooks()
        return
    reach = None if method.radius is None else method.radius * float(tensors["radius"]) * (1 + SLACK)
    with scaling(neurons, "nemo_c") as scaler:
        yield Gated(scaler, factors_of(clusters, method.scale), centroids, reach)
