"""Weighted k-nearest-neighbour classification on frozen features.

N training samples, M test samples, D feature dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.evaluation.shares import broadcast_rows, check_sets, gather_rows, num_classes, percent
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_positive

# Test and training features compared at once; bound the similarities at _CHUNK x _TRAIN_CHUNK.
_CHUNK = 1024
_TRAIN_CHUNK = 8192
# A neighbour is one integer, its similarity in steps of 2^-31 above 31 bits of its place.
_BITS = 31
# Votes are integers in steps of 2^-40, whose sums do not depend on the order.
_VOTE = 2.0**40


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """`knn_accuracies` for one k, of this process's sets alone."""
    sets = (train_features, train_labels, test_features, test_labels)
    return knn_accuracies(*sets, (k,), temperature=temperature, group="")[k]


@torch.no_grad()
def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = (10, 20),
    *,
    temperature: float = 0.07,
    dtype: torch.dtype = torch.float64,
    group: Group = None,
) -> dict[int, float]:
    """Accuracy in percent of the vote of the k most similar training samples, for each k.

    Similarity is the cosine s; a neighbour votes for its label with weight exp(s / temperature)
    (Wu et al. 2018, arXiv:1805.01978; Caron et al. 2021, arXiv:2104.14294). Of equally similar
    samples the one that comes first is nearer; of labels with equal votes the smallest wins.

    Beside the features this takes M x max(ks) neighbours, all N labels and one chunk of
    similarities; the training features of the ranks come by one chunk after the other.

    Args:
        train_features: [N, D], this rank's share.
        train_labels: [N] int64, from 0 on.
        test_features: [M, D], this rank's share.
        test_labels: [M] int64.
        ks: numbers of neighbours; all N where there are fewer.
        dtype: of the products. In float32, faster where float64 is slow, rounding decides which
            of two samples within 1e-7 is nearer, and may do so otherwise on other shares.
        group: the ranks that hold shares; None is the default group, "" this process alone.
    """
    sets = (train_features, train_labels, test_features, test_labels)
    _, test_shares = check_sets(*sets, group)
    check_positive(temperature=temperature)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if not ks:
        raise ValueError("ks must have at least one number of neighbours, got none")
    for k in ks:
        check_int("ks", k, 1)
    classes = num_classes(group, train_labels, test_labels)
    train_labels = gather_rows(train_labels, group)
    keys = _nearest(train_features, test_features, min(max(ks), len(train_labels)), dtype, group)
    correct = test_labels.new_zeros(len(ks))
    for part, truth in zip(keys.split(_CHUNK), test_labels.split(_CHUNK), strict=True):
        similarity = (part >> _BITS).double() * 2.0**-_BITS
        labels = train_labels[_flip(part & (2**_BITS - 1))]
        correct += _num_correct(similarity, labels, truth, ks, temperature, classes)
    return dict(zip(ks, percent(correct, test_shares.total, group), strict=True))


def _flip(place: Tensor) -> Tensor:
    """So that of two equally similar samples the earlier one has the larger key."""
    return 2**_BITS - 1 - place


def _nearest(train: Tensor, test: Tensor, k: int, dtype: torch.dtype, group: Group) -> Tensor:
    """Keys [M, k] of the nearest training samples of all ranks, nearest first."""
    best = [test.new_empty(len(part), 0, dtype=torch.int64) for part in test.split(_CHUNK)]
    for start, rows in broadcast_rows(train, _TRAIN_CHUNK, group):
        rows = normalize(rows.to(dtype), dim=1)
        place = torch.arange(start, start + len(rows), device=rows.device)
        for i, queries in enumerate(test.split(_CHUNK)):
            # A power of two changes no digit of the products.
            similarity = normalize(queries.to(dtype), dim=1).mul_(2.0**_BITS) @ rows.T
            keys = similarity.round_().long().bitwise_left_shift_(_BITS).add_(_flip(place))
            nearest = keys.topk(min(k, len(rows)), dim=1).values
            merged = torch.cat([best[i], nearest], dim=1)
            best[i] = merged.topk(min(k, merged.shape[1]), dim=1).values
    return torch.cat(best)


def _num_correct(
    similarity: Tensor,  # [M, K], nearest first
    labels: Tensor,  # [M, K]
    truth: Tensor,  # [M]
    ks: Sequence[int],
    temperature: float,
    classes: int,
) -> Tensor:  # [len(ks)]
    # Shifted by the nearest one's, which leaves the vote as it is at any temperature.
    weight = torch.exp((similarity - similarity[:, :1]) / temperature)
    weight = (weight * _VOTE).round_().long()
    votes = weight.new_zeros(len(truth), classes)
    correct, counted = truth.new_zeros(len(ks)), 0
    for i in sorted(range(len(ks)), key=ks.__getitem__):
        votes.scatter_add_(1, labels[:, counted : ks[i]], weight[:, counted : ks[i]])
        counted = ks[i]
        correct[i] = (votes.argmax(dim=1) == truth).sum()
    return correct
