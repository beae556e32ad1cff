"""What features and teachers tell without labels.

N samples, D feature dimensions, K prototypes. Features are float64 in here. `group`: the ranks that
hold shares of the samples, None for the default group, "" for this process alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.evaluation.shares import Shares, broadcast_rows, check_features, gather_rows
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_positive

_CHUNK = 4096


def rankme(features: Tensor, *, normalized: bool = False, group: Group = "") -> float:
    """Effective rank of features [N, D], from 1 (collapsed) to min(N, D).

    The exponential of the entropy of the normalised singular values (Garrido et al. 2023, RankMe,
    arXiv:2210.02885). The paper adds 1e-7 to each share, against the logarithm of 0; here
    0 log 0 is 0 and nothing is added, so that the result does not grow with D.

    normalized: as a share of min(N - 1, D), the largest rank that centred features can have;
    N >= 2. Features are not centred here, so that up to N / (N - 1) is possible where N <= D.
    """
    check_tensor("features", features, dim=2)
    count = Shares.of(features, group).total
    _check_rows(count, 2 if normalized else 1)
    values = torch.linalg.svdvals(_triangle(features, group))
    share = values / values.sum().clamp_min(1e-12)
    rank = torch.exp(torch.special.entr(share).sum()).item()
    return rank / min(count - 1, features.shape[1]) if normalized else rank


def _triangle(features: Tensor, group: Group) -> Tensor:
    """A matrix of at most W D rows with the singular values of the features of all ranks.

    By the R factors of their QR decompositions: the eigenvalues of the D x D Gram matrix would do
    too, but as squares they lose all singular values below 1e-8 of the largest.
    """
    triangle = features.new_empty(0, features.shape[1], dtype=torch.float64)
    for rows in features.detach().split(max(_CHUNK, 2 * features.shape[1])):
        stacked = torch.cat([triangle, rows.double()])
        if len(stacked) > stacked.shape[1]:
            stacked = torch.linalg.qr(stacked, mode="r").R
        triangle = stacked
    return gather_rows(triangle, group)


def feature_std(features: Tensor, *, group: Group = "") -> float:
    """Spread of the directions of features [N, D]: 0 is collapse, 1 is uniform on the sphere.

    The standard deviation per dimension of the unit-length features, averaged, times sqrt(D)
    (Chen and He 2021, SimSiam, arXiv:2011.10566, figure 2).
    """
    check_tensor("features", features, dim=2)
    count = Shares.of(features, group).total
    _check_rows(count, 1)
    unit = normalize(features.detach().double(), dim=1)
    mean = collectives.all_reduce_sum(unit.sum(dim=0), group) / count
    variance = collectives.all_reduce_sum((unit - mean).square().sum(dim=0), group) / count
    return (variance.sqrt().mean() * features.shape[1] ** 0.5).item()


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, group: Group = None) -> float:
    """Mean of |x - y|^alpha over positive pairs of unit-length features; 0 where they agree.

    x, y: [N, D], two views of this rank's samples (Wang and Isola 2020, arXiv:2005.10242).
    """
    check_features("x", x)
    check_features("y", y)
    check_shape("y", y, x.shape, "[N, D] as x")
    check_positive(alpha=alpha)
    count = Shares.of(x, group).total
    _check_rows(count, 1, "x")
    difference = normalize(x.detach().double(), dim=1) - normalize(y.detach().double(), dim=1)
    total = difference.norm(dim=1).pow(alpha).sum()
    return collectives.all_reduce_sum(total, group).item() / count


def uniformity(x: Tensor, *, t: float = 2.0, group: Group = None) -> float:
    """Log of the mean of exp(-t |x_i - x_j|^2) over all pairs i != j of unit-length features.

    x: [N, D], this rank's share. 0 is collapse; -2 t is the mean distance of directions at right
    angles (Wang and Isola 2020, arXiv:2005.10242). N^2 D products over all ranks, in chunks.
    """
    check_features("x", x)
    check_positive(t=t)
    shares = Shares.of(x, group)
    count = shares.total
    _check_rows(count, 2, "x")
    own = normalize(x.detach().double(), dim=1)
    total = own.new_zeros(())
    for place, rows in broadcast_rows(own, _CHUNK, group):
        # 1, or 0 for a feature of length 0.
        square = rows.square().sum(dim=1)
        for i, part in enumerate(own.split(_CHUNK)):
            distance = part.square().sum(dim=1, keepdim=True) + square - 2 * part @ rows.T
            kernel = torch.exp(-t * distance)
            # Without the pairs of a sample with itself: subtracted from the sum, their rounding
            # would drown what is small.
            kernel.diagonal(shares.start + i * _CHUNK - place).zero_()
            total += kernel.sum()
    total = collectives.all_reduce_sum(total, group)
    return (total / (count * (count - 1))).log().item()


@dataclass(frozen=True)
class TeacherEntropy:
    """In nats, from 0 to ln K. Both 0: all samples on one prototype. Both ln K: no assignment."""

    per_sample: float  # mean over samples of the entropy of their assignment
    of_mean: float  # entropy of the mean assignment


def teacher_entropy(
    logits: Tensor,
    temperature: float = 0.04,
    center: Tensor | None = None,
    *,
    group: Group = None,
) -> TeacherEntropy:
    """Entropies of softmax((logits - center) / temperature), the assignments of a teacher.

    logits: [N, K], this rank's share; center: [K] or [1, K], the same on all ranks.
    """
    check_features("logits", logits)
    check_positive(temperature=temperature)
    num_prototypes = logits.shape[1]
    if center is not None:
        check_tensor("center", center, dim=(1, 2), device=logits.device)
        leading = (1,) * (center.dim() - 1)
        check_shape("center", center, (*leading, num_prototypes), "[K] or [1, K]")
        center = center.detach().double()
    count = Shares.of(logits, group).total
    _check_rows(count, 1, "logits")
    # The last number is the sum of the samples' entropies.
    totals = logits.new_zeros(num_prototypes + 1, dtype=torch.float64)
    for rows in logits.detach().split(_CHUNK):
        shifted = rows.double() if center is None else rows.double() - center
        probabilities = (shifted / temperature).softmax(dim=1)
        totals[:-1] += probabilities.sum(dim=0)
        totals[-1] += torch.special.entr(probabilities).sum()
    means = collectives.all_reduce_sum(totals, group) / count
    return TeacherEntropy(means[-1].item(), torch.special.entr(means[:-1]).sum().item())


def _check_rows(count: int, minimum: int, name: str = "features") -> None:
    if count < minimum:
        raise ValueError(f"{name} must have at least {minimum} rows over all ranks, got {count}")
