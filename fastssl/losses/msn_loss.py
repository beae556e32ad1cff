"""Masked Siamese networks (Assran et al. 2022, arXiv 2204.07141).

B images, V anchor views, D the embedding, K prototypes, W processes.
"""

import math

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import (
    Stats,
    aliases,
    check_not_negative,
    check_not_swapped,
    check_positive,
    cross_entropy_stats,
    resolved,
)


class MSNLoss(nn.Module):
    """Anchors predict the sharpened assignment of the target view to prototypes::

        p[v] = softmax(cos(anchor[v], prototypes) / tau)
        q = softmax(cos(target, prototypes) / tau) ** (1 / T), to sum 1; then Sinkhorn-Knopp
        loss = mean over views and images of  -sum_k q log p[v]
             + me_max_weight * (ln K - H(mean of p over all anchors))    # me-max
             + entropy_weight * mean H(p[v])

    Arguments, in the official order:
        num_views: V.
        tau: temperature of the assignments (also temperature).
        me_max: whether the mean assignment is regularised.
        me_max_weight: also regularization_weight.
        sinkhorn_iterations: 0 for none.
        group, gather_distributed: over whose batches Sinkhorn and the mean assignment go; None is
            the default group, gather_distributed=False this process alone.

    Targets get no gradient, prototypes theirs through the anchors. The mean over ranks of the
    gradients is that of one process on the whole batch.
    """

    @aliases(temperature="tau", regularization_weight="me_max_weight")
    def __init__(
        self,
        num_views: int = 1,
        tau: float = 0.1,
        me_max: bool = True,
        *,
        me_max_weight: float = 1.0,
        entropy_weight: float = 0.0,
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        check_int("num_views", num_views, 1)
        check_positive(tau=tau)
        check_not_negative(me_max_weight=me_max_weight, entropy_weight=entropy_weight)
        check_int("sinkhorn_iterations", sinkhorn_iterations, 0)
        self.num_views = num_views
        self.tau = tau
        self.me_max_weight = me_max_weight if me_max else 0.0
        self.entropy_weight = entropy_weight
        self.sinkhorn_iterations = sinkhorn_iterations
        self.group = resolved(group, gather_distributed)

    def forward(
        self,
        anchor_views: Tensor,  # [V * B, D], views one after the other
        target_views: Tensor,  # [B, D]
        prototypes: Tensor,  # [K, D]
        T: float = 0.25,
        *,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, Stats]:
        """The loss; with return_stats also {"teacher_entropy" and "mean_entropy", of the targets
        and of the mean anchor's assignment in nats, "loss_over_log_k", of the cross-entropy}.

        T sharpens the targets. Under FSDP2 call this inside the module that owns the prototypes.
        """
        self._check(anchor_views, target_views, prototypes, T)
        prototypes = nn.functional.normalize(prototypes, dim=1)
        anchors = _scores(anchor_views, prototypes)  # [V * B, K]
        with torch.no_grad():
            targets = _scores(target_views, prototypes)
        num_prototypes = prototypes.shape[0]
        loss, entropy = F.dino_cross_entropy(
            anchors.unflatten(0, (self.num_views, -1)),
            targets[None],
            student_temp=self.tau,
            teacher_temp=self.tau * T,
            log_u=self._sinkhorn(targets / (self.tau * T)),
            skip_same_view=False,
            return_teacher_entropy=True,
        )
        stats = cross_entropy_stats(loss, num_prototypes, teacher_entropy=entropy)
        if self.me_max_weight or self.entropy_weight or return_stats:
            probabilities = (anchors / self.tau).softmax(dim=1)
            size = collectives.world_size(self.group)
            mean = collectives.all_reduce_with_grad(probabilities.mean(dim=0), self.group) / size
            mean_entropy = _entropy(mean)
            stats["mean_entropy"] = mean_entropy.detach()
            loss = loss + self.me_max_weight * (math.log(num_prototypes) - mean_entropy)
            loss = loss + self.entropy_weight * _entropy(probabilities).mean()
        return (loss, stats) if return_stats else loss

    def _sinkhorn(self, scores: Tensor) -> Tensor | None:  # [B, K] -> [K]
        if not self.sinkhorn_iterations:
            return None
        # The official code balances the sharpened probabilities, whose rows sum to 1 already.
        log_u, _ = F.sinkhorn_knopp(
            scores.log_softmax(dim=1),
            temperature=1.0,
            num_iters=self.sinkhorn_iterations,
            group=self.group,
            materialize=False,
        )
        return log_u

    def _check(self, anchors: Tensor, targets: Tensor, prototypes: Tensor, T: float) -> None:
        check_tensor("anchor_views", anchors, dim=2)
        device = anchors.device
        check_tensor("target_views", targets, dim=2, device=device)
        check_tensor("prototypes", prototypes, dim=2, device=device)
        check_shape("target_views", targets, (None, anchors.shape[1]), "[B, D]")
        check_shape("prototypes", prototypes, (None, anchors.shape[1]), "[K, D]")
        if not targets.shape[0] or anchors.shape[0] != self.num_views * targets.shape[0]:
            raise ValueError(
                f"anchor_views must have {self.num_views} * B rows beside target_views of B, got "
                f"{anchors.shape[0]} and {targets.shape[0]} (are the two swapped?)"
            )
        check_positive(T=T)
        check_not_swapped("anchor_views", anchors, "target_views", targets)


def _scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines, in float32 at least: they are divided by small temperatures."""
    wide = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        features = nn.functional.normalize(features.to(wide), dim=1)
        return nn.functional.linear(features, prototypes.to(wide))


def _entropy(probabilities: Tensor) -> Tensor:  # [..., K] -> [...]
    # The smallest normal number in place of 0, whose logarithm has no gradient.
    smallest = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=smallest).log()).sum(dim=-1)
