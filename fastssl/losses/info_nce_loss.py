"""Contrast of queries with momentum keys (MoCo: He et al. 2020, arXiv 1911.05722; v3: Chen et al.
2021, arXiv 2104.02057).

N queries, D the embedding, M keys in the queue, W processes.
"""

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import (
    Stats,
    aliases,
    check_not_swapped,
    check_positive,
    cross_entropy_stats,
    resolved,
)


class InfoNCELoss(nn.Module):
    """Cross-entropy of each query's own key against other keys, cosines / temperature.

    temperature: MoCo's are 0.07 (v1), 0.2 (v2 and v3, whose loss is 2 * temperature times this).
    queue_size: M, MoCo's 65536; 0 for none (also memory_bank_size, K). With a queue the other keys
        are those in it, and keys get no gradient; without, those of the batch of all ranks.
    dim: D, for the queue.
    in_batch_negatives: None is the above; True adds the batch's keys to those of the queue.
    update_queue: True pushes the keys in every forward. False is for gradient accumulation: forward
        only collects, and `step()`, once per optimizer step after backward, pushes; this also saves
        the copy of the queue that backward needs otherwise.
    group, gather_distributed: whose batches are one batch; None is the default group,
        gather_distributed=False this process alone.

    The queue [M, D] starts as random unit vectors, the same everywhere. It and `queue_ptr`, the
    oldest key's place, are in the state dict and the same on all ranks: they hold what all ranks
    pushed. A batch need not divide M. Sizes are equal on all ranks.
    """

    queue: Tensor | None
    queue_ptr: Tensor | None

    @aliases(memory_bank_size="queue_size", K="queue_size", T="temperature")
    def __init__(
        self,
        temperature: float = 0.07,
        queue_size: int = 0,
        dim: int = 128,
        *,
        in_batch_negatives: bool | None = None,
        update_queue: bool = True,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        check_int("queue_size", queue_size, 0)
        check_int("dim", dim, 1)
        if queue_size == 0 and in_batch_negatives is False:
            raise ValueError("in_batch_negatives must not be False for a queue_size of 0")
        self.temperature = temperature
        if in_batch_negatives is None:
            in_batch_negatives = queue_size == 0
        self.in_batch_negatives = in_batch_negatives
        self.update_queue = update_queue
        self.group = resolved(group, gather_distributed)
        queue = pointer = None
        if queue_size:
            generator = torch.Generator().manual_seed(0)
            queue = torch.randn(queue_size, dim, generator=generator, device="cpu")
            queue = nn.functional.normalize(queue, dim=1)
            pointer = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("queue", queue)
        self.register_buffer("queue_ptr", pointer)
        self._collected: list[Tensor] = []

    def forward(
        self,
        queries: Tensor,  # [N, D], normalised inside
        keys: Tensor,  # [N, D], key n belongs to query n
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"loss_over_log_k"}, K the candidates of a query."""
        check_tensor("queries", queries, dim=2)
        check_tensor("keys", keys, dim=2, device=queries.device)
        if queries.shape != keys.shape or not queries.shape[0]:
            raise ValueError(
                "keys must have the shape [N, D] of queries, N at least 1, got "
                f"{list(keys.shape)} beside {list(queries.shape)}"
            )
        check_not_swapped("queries", queries, "keys", keys)
        negatives = None
        if self.queue is not None:
            if keys.shape[1] != self.queue.shape[1]:
                raise ValueError(f"keys must have dim {self.queue.shape[1]}, got {keys.shape[1]}")
            keys = keys.detach()
            negatives = self.queue.to(queries.dtype)
            if self.update_queue and negatives is self.queue:
                negatives = negatives.clone()
        loss = F.info_nce(
            queries,
            keys,
            temperature=self.temperature,
            negatives=negatives,
            in_batch_negatives=self.in_batch_negatives,
            group=self.group,
        )
        if negatives is not None:
            wide = torch.promote_types(keys.dtype, torch.float32)
            self._collected.append(nn.functional.normalize(keys.to(wide), dim=1))
            if self.update_queue:
                self.step()
        if not return_stats:
            return loss
        return loss, cross_entropy_stats(loss, self._candidates(queries.shape[0]))

    def _candidates(self, batch: int) -> int:
        whole = batch * collectives.world_size(self.group) if self.in_batch_negatives else 1
        return whole + (0 if self.queue is None else self.queue.shape[0])

    @torch.no_grad()
    def step(self) -> None:
        """Push all collected keys of all ranks, and forget them. Every rank must call it."""
        if not self._collected:
            return
        keys = collectives.all_gather_with_grad(torch.cat(self._collected), self.group)
        self._collected = []
        size, pushed = self.queue.shape[0], keys.shape[0]
        # The oldest of more keys than there are places would be overwritten at once.
        first = max(0, pushed - size)
        places = torch.arange(first, pushed, device=keys.device) + self.queue_ptr
        self.queue.index_copy_(0, places % size, keys[first:].to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + pushed) % size)

    def discard(self) -> None:
        """Forget what was collected, as after a step that was not made."""
        self._collected = []
