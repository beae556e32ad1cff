"""What methods share that cluster the whole dataset, between epochs.

B images of a batch, V views, N samples, H heads of K clusters each, D the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import check_positive, cross_entropy_stats
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, encode, num_features
from fastssl.methods.memory_bank import MemoryBank
from fastssl.methods.views import SWAV
from fastssl.nn import SwAVProjectionHead

# Scores that are computed at a time, 64 MB.
_CHUNK = 2**24
# The entropy of the assignments that stand in for missing ones, as in SwAV.
_EPSILON = 0.05


class ClusteringMethod(Method):
    """Every view of an image predicts the cluster that the image had in the epoch before::

        z    = normalize(head(encoder(view))), scores[h] = z @ prototypes[h].T
        loss = mean over heads, views and images of
               -log softmax(scores[h] / temperature)[assignments[h, image]]

    The mean embedding of an image's crops_for_assign is kept in `memory`, as it comes by in
    training. Where an epoch ends, a subclass's `assign` clusters all of them and fills
    `assignments` [H, N] for the next. Both are in the state dict and the same on all ranks.

    In the first epoch, where there is nothing to go by yet, Sinkhorn-Knopp assigns the images of
    each batch, as in SwAV. A sample that has not come by yet, being one of the few that do not fill
    a batch in an epoch, has no embedding (its row in memory is 0) and the assignment -1, and counts
    0 in the loss.

    hidden_dim, output_dim: of the projection head. n_prototypes, num_heads: K and H.
    """

    views = SWAV
    assignments: Tensor

    def __init__(
        self,
        setting: Setting,
        name: str,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        n_prototypes: int = 3000,
        num_heads: int = 3,
        temperature: float = 0.1,
        crops_for_assign: Sequence[int] = (0, 1),
    ) -> None:
        super().__init__()
        check_views(setting, name, 1, at_least=True)
        check_int("n_prototypes", n_prototypes, 1)
        check_int("num_heads", num_heads, 1)
        check_positive(temperature=temperature)
        for view in crops_for_assign:
            check_int("crops_for_assign", view, 0, setting.num_views - 1)
        if not crops_for_assign:
            raise ValueError("crops_for_assign must be at least one view, got none")
        if n_prototypes > setting.num_samples:
            raise ValueError(
                f"n_prototypes must be at most the {setting.num_samples} samples, "
                f"got {n_prototypes}"
            )
        self.n_prototypes, self.num_heads = n_prototypes, num_heads
        self.output_dim = output_dim
        self.temperature, self.crops_for_assign = temperature, list(crops_for_assign)
        self.steps_per_epoch, self.seed = setting.steps_per_epoch, setting.seed
        self.model = setting.encoder
        self.head = SwAVProjectionHead(num_features(setting), hidden_dim, output_dim)
        self.memory = MemoryBank(setting.num_samples, output_dim, momentum=0.0)
        self.memory.bank.zero_()
        unknown = torch.full((num_heads, setting.num_samples), -1)
        self.register_buffer("assignments", unknown)
        self._step = 0

    def weight(self) -> Tensor:
        """The prototypes [H * K, D] of length 1; in a forward."""
        raise NotImplementedError

    def assign(self, epoch: int) -> None:
        """Fill `assignments` for this epoch."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = encode(self.model, batch.views)
        z = normalize(self.head(features), dim=1)
        scores = linear(z, self.weight()).unflatten(1, (self.num_heads, -1))  # [V * B, H, K]
        embedding = z.detach().unflatten(0, (-1, len(batch)))[self.crops_for_assign].mean(0)
        self.memory.collect(batch.index, embedding)
        self._step = batch.step
        if batch.epoch == 0:
            targets = self._assign_batch(embedding)
        else:
            targets = self.assignments[:, batch.index]
        targets = targets.T.repeat(len(batch.views), 1)  # [V * B, H]
        logits = (scores / self.temperature).flatten(0, 1)
        losses = cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        # Divided by all images, counting or not, of which every rank has equally many.
        loss = losses.mean()
        stats = cross_entropy_stats(loss, self.n_prototypes)
        return {"loss": loss, "features": features.detach(), **stats}

    def after_step(self) -> None:
        super().after_step()
        self._end_step()

    def skip_step(self) -> None:
        super().skip_step()
        # The data go on, and with them the epochs.
        self._end_step()

    def _end_step(self) -> None:
        epoch, steps = divmod(self._step + 1, self.steps_per_epoch)
        if steps == 0:
            with torch.no_grad():
                self.assign(epoch)

    @torch.no_grad()
    def _assign_batch(self, embedding: Tensor) -> Tensor:  # [B, D] -> [H, B]
        scores = linear(normalize(embedding, dim=1), self.weight())
        heads = scores.chunk(self.num_heads, dim=1)
        return torch.stack([F.sinkhorn_knopp(s, temperature=_EPSILON).argmax(dim=1) for s in heads])


def chunks(embeddings: Tensor, prototypes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """([n, D], their scores [n, K]), so many embeddings at a time that memory is no concern."""
    for part in embeddings.split(max(_CHUNK // len(prototypes), 1)):
        yield part, linear(part, prototypes)


def nearest(
    embeddings: Tensor, prototypes: Tensor, log_weights: float | Tensor = 0.0
) -> Tensor:  # [N]
    """The prototype with the largest score + log_weights [K] of each embedding; -1 for a 0."""
    found = [(s + log_weights).argmax(dim=1) for _, s in chunks(embeddings, prototypes)]
    return torch.cat(found).where(embeddings.any(dim=1), -1)
