"""DeepCluster v2 (Caron et al., 2020, arXiv:2006.09882, appendix; 2018, arXiv:1807.05520)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl import functional as F
from fastssl.kernels.common.checks import check_int
from fastssl.methods.base import Setting
from fastssl.methods.clustering import ClusteringMethod, chunks, nearest


def spherical_kmeans(embeddings: Tensor, initial: Tensor, num_iters: int) -> Tensor:
    """Centroids [K, D] of length 1 of embeddings [N, D], from `initial` [K, D] on::

        num_iters times: centroid[k] = normalize(sum of the embeddings that are nearest to it)

    A centroid without embeddings stays. A row of 0 belongs to none.
    """
    centroids = initial
    for _ in range(num_iters):
        sums = torch.zeros_like(centroids)
        for part, scores in chunks(embeddings, centroids):
            members = scores.argmax(dim=1, keepdim=True)
            # Summed by a product: adding by index has no fixed order on a GPU.
            sums += scores.zero_().scatter_(1, members, 1.0).T @ part
        moved = normalize(sums, dim=1)
        centroids = moved.where(moved.any(dim=1, keepdim=True), centroids)
    return centroids


class DeepClusterV2(ClusteringMethod):
    """Clusters by spherical k-means, whose centroids are the prototypes: see `ClusteringMethod`.

    The centroids [H * K, D] move at the end of an epoch only. k-means starts at K different
    samples, which are keyed by seed, epoch and head, so that heads differ. Before the first
    clustering the centroids are random.

    num_iters: of k-means.
    """

    centroids: Tensor

    def __init__(self, setting: Setting, *, num_iters: int = 10, **options: Any) -> None:
        super().__init__(setting, "deepcluster_v2", **options)
        check_int("num_iters", num_iters, 1)
        self.num_iters = num_iters
        rows = torch.arange(self.num_heads * self.n_prototypes)
        uniform = F.keyed_uniform(rows, self.output_dim, seed=self.seed, stream=F.STREAM_METHOD)
        self.register_buffer("centroids", normalize(uniform - 0.5, dim=1))

    def weight(self) -> Tensor:
        return self.centroids

    def assign(self, epoch: int) -> None:
        bank = self.memory.bank
        heads = self.centroids.chunk(self.num_heads)
        for head, (centroids, assignments) in enumerate(zip(heads, self.assignments, strict=True)):
            initial = bank[self._first(epoch, head)]
            # Where fewer samples than clusters have come by, the rest start where they are.
            initial = initial.where(initial.any(dim=1, keepdim=True), centroids)
            centroids.copy_(spherical_kmeans(bank, initial, self.num_iters))
            assignments.copy_(nearest(bank, centroids))

    def _first(self, epoch: int, head: int) -> Tensor:  # [K]
        """Samples to start at, random among those that have an embedding."""
        bank = self.memory.bank
        samples = torch.arange(len(bank), device=bank.device)
        noise = F.keyed_uniform(
            samples, 1, seed=self.seed, epoch=epoch, view=head, stream=F.STREAM_METHOD
        )
        noise = noise[:, 0].where(bank.any(dim=1), 1.0)
        return noise.argsort(stable=True)[: self.n_prototypes]
