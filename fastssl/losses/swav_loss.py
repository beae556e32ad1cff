"""Swapped assignment of clusters between views (Caron et al. 2020, arXiv 2006.09882).

B images, S views, T of which get an assignment, K prototypes, D the embedding, W processes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import Stats, aliases, check_positive, cross_entropy_stats, resolved

Prototypes = Tensor | Callable[[Tensor], Tensor]


class SwAVLoss(torch.nn.Module):
    """Each view predicts the assignment of other views::

        q[t] = Sinkhorn-Knopp of scores[t] / epsilon, over the batches of all ranks and the queue
        p[s] = softmax(scores[s] / temperature)
        loss = mean over t in crops_for_assign, s != t and images of  -sum_k q[t] log p[s]

    Arguments, by their official names:
        crops_for_assign: the views that get an assignment.
        nmb_crops: how many views of each size; S is their sum.
        temperature, epsilon, sinkhorn_iterations: as in the formula (epsilon also
            sinkhorn_epsilon).
        queue_length, feat_dim: embeddings kept for each view of crops_for_assign, all ranks'
            together, and their width; 0 for no queue.
        update_queue: True pushes in every forward. False is for gradient accumulation: forward only
            collects, and `step()`, once per optimizer step, pushes.
        group, gather_distributed (also sinkhorn_gather_distributed): whose batches are one batch;
            None is the default group, gather_distributed=False this process alone.

    The queue [T, queue_length, D], newest first, is in the state dict and the same on all ranks: it
    holds what all of them pushed. As in the official code it counts once it is full, which is
    decided on the device. Every rank scores its share of it, so that queue_length must be a
    multiple of W. Assignments get no gradient.
    """

    queue: Tensor | None

    @aliases(sinkhorn_epsilon="epsilon", sinkhorn_gather_distributed="gather_distributed")
    def __init__(
        self,
        crops_for_assign: Sequence[int] = (0, 1),
        nmb_crops: Sequence[int] = (2,),
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 0,
        feat_dim: int = 128,
        *,
        update_queue: bool = True,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        for size in nmb_crops:
            check_int("nmb_crops", size, 0)
        self.num_views = sum(nmb_crops)
        check_int("sum of nmb_crops", self.num_views, 2)
        for view in crops_for_assign:
            check_int("crops_for_assign", view, 0, self.num_views - 1)
        if not crops_for_assign or len(set(crops_for_assign)) != len(crops_for_assign):
            raise ValueError(
                f"crops_for_assign must be different views, at least one, got {crops_for_assign}"
            )
        check_positive(temperature=temperature, epsilon=epsilon)
        check_int("sinkhorn_iterations", sinkhorn_iterations, 1)
        check_int("queue_length", queue_length, 0)
        check_int("feat_dim", feat_dim, 1)
        self.crops_for_assign = tuple(crops_for_assign)
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.update_queue = update_queue
        self.group = resolved(group, gather_distributed)
        rest = [v for v in range(self.num_views) if v not in self.crops_for_assign]
        # The op takes the assigned views first.
        self._order = [*self.crops_for_assign, *rest]
        size = (len(self.crops_for_assign), queue_length, feat_dim)
        self.register_buffer("queue", torch.zeros(size) if queue_length else None)
        self._collected: list[Tensor] = []

    def forward(
        self,
        output: Tensor,  # [S * B, K] scores, views one after the other
        embedding: Tensor | None = None,  # [S * B, D] or [T * B, D], what was scored
        prototypes: Prototypes | None = None,  # [K, D], or a function that scores
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"teacher_entropy" in nats, "loss_over_log_k"}.

        With a queue, give embedding and prototypes from the epoch on in which it shall start
        (epoch_queue_starts of the official code). Prototypes are a weight or a module, to be used
        inside the forward of what owns them under FSDP2: see `SwAVPrototypes`.
        """
        self._check(output, embedding, prototypes)
        views = output.unflatten(0, (self.num_views, -1))
        if self._order != list(range(self.num_views)):
            views = torch.stack([views[v] for v in self._order])
        assigned = views[: len(self.crops_for_assign)].detach()
        queued = None if embedding is None else self._score_queue(prototypes)
        loss, entropy = F.dino_cross_entropy(
            views,
            assigned,
            log_u=self._assign(assigned, queued),
            student_temp=self.temperature,
            teacher_temp=self.epsilon,
            return_teacher_entropy=True,
        )
        if embedding is not None:
            self._collect(embedding.detach(), views.shape[1])
        if not return_stats:
            return loss
        return loss, cross_entropy_stats(loss, output.shape[1], teacher_entropy=entropy)

    @torch.no_grad()
    def step(self) -> None:
        """Push all collected embeddings of all ranks, and forget them. Every rank must call it."""
        if not self._collected:
            return
        new = torch.cat(self._collected, dim=1)  # [T, n, D]
        self._collected = []
        everyone = collectives.all_gather_with_grad(new[None], self.group)  # [W, T, n, D]
        everyone = everyone.transpose(0, 1).flatten(1, 2).to(self.queue.dtype)
        length = self.queue.shape[1]
        self.queue.copy_(torch.cat([everyone, self.queue], dim=1)[:, :length])

    def discard(self) -> None:
        """Forget what was collected, as after a step that was not made."""
        self._collected = []

    def _collect(self, embedding: Tensor, batch: int) -> None:
        embedding = embedding.unflatten(0, (-1, batch))
        if embedding.shape[0] == self.num_views:
            embedding = torch.stack([embedding[v] for v in self.crops_for_assign])
        self._collected.append(embedding)
        if self.update_queue:
            self.step()

    @torch.no_grad()
    def _score_queue(self, prototypes: Prototypes) -> Tensor:  # [T, Q / W, K]
        size, rank = collectives.world_size(self.group), collectives.rank(self.group)
        share, rest = divmod(self.queue.shape[1], size)
        if rest:
            raise ValueError(
                f"queue_length must be a multiple of {size} processes, got {self.queue.shape[1]}"
            )
        mine = self.queue[:, rank * share : (rank + 1) * share]
        if isinstance(prototypes, Tensor):
            return torch.nn.functional.linear(mine.to(prototypes.dtype), prototypes)
        return prototypes(mine)

    @torch.no_grad()
    def _assign(self, assigned: Tensor, queued: Tensor | None) -> Tensor:  # [T, K]
        vectors = []
        for view in range(assigned.shape[0]):
            logits, rows = assigned[view], None
            if queued is not None:
                logits = torch.cat([logits, queued[view].to(logits.dtype)])
                is_full = self.queue[view, -1].any()
                rows = torch.where(is_full, logits.shape[0], assigned.shape[1])
            log_u, _ = F.sinkhorn_knopp(
                logits,
                temperature=self.epsilon,
                num_iters=self.sinkhorn_iterations,
                group=self.group,
                materialize=False,
                num_rows=rows,
            )
            vectors.append(log_u)
        return torch.stack(vectors)

    def _check(
        self, output: Tensor, embedding: Tensor | None, prototypes: Prototypes | None
    ) -> None:
        check_tensor("output", output, dim=2)
        if not output.shape[0] or output.shape[0] % self.num_views:
            raise ValueError(
                f"output must have shape [{self.num_views} * B, K], got {list(output.shape)}"
            )
        if embedding is None:
            if prototypes is not None:
                raise ValueError("embedding must be given where prototypes are, got None")
            return
        if self.queue is None:
            raise ValueError("embedding must be None for a loss of queue_length 0")
        if prototypes is None:
            raise ValueError("prototypes must be given where embedding is, got None")
        width = self.queue.shape[2]
        check_tensor("embedding", embedding, dim=2, device=output.device)
        batch = output.shape[0] // self.num_views
        allowed = [views * batch for views in (self.num_views, len(self.crops_for_assign))]
        if embedding.shape[0] not in allowed or embedding.shape[1] != width:
            raise ValueError(
                f"embedding must have {allowed[0]} or {allowed[1]} rows of feat_dim {width}, "
                f"got {list(embedding.shape)}"
            )
        if isinstance(prototypes, Tensor):
            check_shape("prototypes", prototypes, (output.shape[1], width), "[K, feat_dim]")
