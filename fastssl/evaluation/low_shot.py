"""Learning from few labels: which samples, and how well it goes.

N training and M test samples, D feature dimensions, C classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl import functional as F
from fastssl.evaluation.knn import knn_accuracies
from fastssl.evaluation.linear import logistic_regression
from fastssl.evaluation.shares import (
    Shares,
    check_labels,
    check_sets,
    gather_rows,
    num_classes,
    percent,
)
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group

# Beside the two halves of pictures, views 0 and 1 of the stream.
_VIEW = 2


@dataclass(frozen=True)
class Spread:
    """Accuracies in percent, one per seed: mean and sample deviation (nan for one seed)."""

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), std, tuple(values))


def low_shot_split(
    labels: Tensor,
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """Indices, sorted, of a random part of every class.

    A function of (seed, ids, labels): with ids given, whichever rank holds a sample, and in
    whichever order, it is chosen or not.

    Args:
        labels: [N] int64, this rank's share; the indices are into it.
        per_class: samples of each class; all of a class that has fewer.
        fraction: share of each class in (0, 1], rounded, at least one sample. Exactly one of
            per_class and fraction must be given.
        ids: [N] int64 from 0 on, one per sample, all different over the ranks; by default the
            place among the samples of all ranks.
        group: the ranks that hold shares; None is the default group, "" this process alone.
    """
    check_labels("labels", labels)
    if (per_class is None) == (fraction is None):
        raise ValueError(
            f"one of per_class and fraction must be given, got {per_class} and {fraction}"
        )
    if per_class is not None:
        check_int("per_class", per_class, 1)
    elif not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    shares = Shares.of(labels, group)
    all_labels = gather_rows(labels, group)
    if ids is None:
        all_ids = torch.arange(shares.total, device=labels.device)
    else:
        check_labels("ids", ids, labels)
        all_ids = gather_rows(ids, group)
        if len(all_ids.unique()) < shares.total:
            raise ValueError("ids must be all different, got some twice")
    order = _random_within_class(all_labels, all_ids, seed)
    counts = all_labels.bincount()
    if fraction is None:
        wanted = counts.clamp(max=per_class)
    else:
        wanted = (counts.double() * fraction).round().long().clamp(min=1)
    of_class = all_labels[order]
    # How many of its class come before a sample: classes lie one after the other in `order`.
    first = counts.cumsum(0) - counts
    before = torch.arange(shares.total, device=labels.device) - first[of_class]
    return shares.own(order[before < wanted[of_class]]).sort().values


def _random_within_class(labels: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Places sorted by label, within a label in a random order."""
    # Stable sorts by the least important key first; two numbers of 24 bits are seldom equal, and
    # where they are the smaller id comes first.
    order = ids.argsort()
    noise = F.keyed_uniform(ids, 2, seed=seed, view=_VIEW, stream=F.STREAM_EVAL).double()
    order = order[(noise[:, 0] + noise[:, 1] * 2.0**-24)[order].argsort(stable=True)]
    return order[labels[order].argsort(stable=True)]


def low_shot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    per_class: int | None = None,
    fraction: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    c: float = 1.0,
    ids: Tensor | None = None,
    group: Group = None,
) -> dict[str, Spread]:
    """Accuracy of classifiers of frozen features that learn from a `low_shot_split`.

    Every rank gets the chosen training features of all ranks.

    Args:
        train_features: [N, D], this rank's share.
        train_labels: [N] int64, from 0 on.
        test_features: [M, D], this rank's share.
        test_labels: [M] int64.
        per_class, fraction, ids, group: as in `low_shot_split`.
        seeds: a split each.
        c: inverse strength of the logistic regression's penalty.

    Returns:
        "linear", a logistic regression (MSN, arXiv:2204.07141), and "prototype", the most similar
        of the classes' means of unit-length features (Snell et al. 2017, arXiv:1703.05175).
    """
    sets = (train_features, train_labels, test_features, test_labels)
    _, test_shares = check_sets(*sets, group)
    if not seeds:
        raise ValueError("seeds must be at least one, got none")
    classes = num_classes(group, train_labels, test_labels)
    values: dict[str, list[float]] = {"linear": [], "prototype": []}
    for seed in seeds:
        chosen = low_shot_split(
            train_labels, per_class=per_class, fraction=fraction, seed=seed, ids=ids, group=group
        )
        features = gather_rows(train_features[chosen], group)
        labels = gather_rows(train_labels[chosen], group)
        classifier = logistic_regression(features, labels, classes, c=c)
        correct = (classifier(test_features) == test_labels).sum()
        values["linear"].append(percent(correct[None], test_shares.total, group)[0])
        means, present = _class_means(features, labels)
        # Every rank brings the same prototypes; which of the copies is nearest does not matter.
        prototypes = (means, present, test_features, test_labels)
        values["prototype"].append(knn_accuracies(*prototypes, (1,), group=group)[1])
    return {name: Spread.of(accuracies) for name, accuracies in values.items()}


def _class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Means [c, D] of the classes that occur, and these [c]."""
    present = labels.unique()
    unit = normalize(features.double(), dim=1)
    return torch.stack([unit[labels == label].mean(dim=0) for label in present]), present
