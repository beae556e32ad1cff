"""SwAV (Caron et al., 2020, arXiv:2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear, normalize

from fastssl.data import Batch
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.losses import SwAVLoss
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, encode, num_features
from fastssl.methods.views import SWAV
from fastssl.nn import SwAVProjectionHead, SwAVPrototypes


class SwAV(Method):
    """Each view predicts to which prototypes the other views of its image are assigned::

        z      = normalize(head(encoder(view))), scores = z @ prototypes.T, both of length 1
        q[t]   = Sinkhorn-Knopp of scores[t] / epsilon, over the batch of all ranks and the queue
        loss   = mean over t in crops_for_assign, s != t of  -sum_k q[t] log softmax(scores[s] / T)

    hidden_dim, output_dim: of the projection head. n_prototypes: K.
    temperature, epsilon, sinkhorn_iterations, crops_for_assign: see `SwAVLoss`.
    queue_length: embeddings kept per view of crops_for_assign, for small batches (3840 in the
        paper, for batches of 256); 0 for none. It fills from epoch `epoch_queue_starts` on and
        counts once it is full.
    freeze_prototypes_steps: the first steps, in which the prototypes stay.
    """

    views = SWAV

    def __init__(
        self,
        setting: Setting,
        *,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        n_prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        crops_for_assign: Sequence[int] = (0, 1),
        queue_length: int = 0,
        epoch_queue_starts: int = 15,
        freeze_prototypes_steps: int = 313,
    ) -> None:
        super().__init__()
        check_views(setting, "swav", 2, at_least=True)
        check_int("epoch_queue_starts", epoch_queue_starts, 0)
        if queue_length % collectives.world_size():
            raise ValueError(
                f"queue_length must be a multiple of {collectives.world_size()} processes, "
                f"got {queue_length}"
            )
        check_int("freeze_prototypes_steps", freeze_prototypes_steps, 0)
        self.epoch_queue_starts = epoch_queue_starts
        self.freeze_prototypes_steps = freeze_prototypes_steps
        self.model = setting.encoder
        self.head = SwAVProjectionHead(num_features(setting), hidden_dim, output_dim)
        self.prototypes = SwAVPrototypes(output_dim, n_prototypes)
        self.prototypes.normalize_()
        self.loss = SwAVLoss(
            crops_for_assign,
            [view.number for view in setting.views],
            temperature,
            epsilon,
            sinkhorn_iterations,
            queue_length,
            output_dim,
            update_queue=False,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = encode(self.model, batch.views)
        z = normalize(self.head(features), dim=1)
        weight = self.prototypes.weight
        if batch.step < self.freeze_prototypes_steps:
            # Without any gradient the optimizer leaves them alone; zeros it would decay.
            weight = weight.detach()
        scores = linear(z, weight)
        queued = (z.detach(), weight.detach()) if self._uses_queue(batch) else ()
        loss, stats = self.loss(scores, *queued, return_stats=True)
        return {"loss": loss, "features": features.detach(), **stats}

    def after_step(self) -> None:
        super().after_step()
        self.prototypes.normalize_()

    def _uses_queue(self, batch: Batch) -> bool:
        return self.loss.queue is not None and batch.epoch >= self.epoch_queue_starts
