"""Weighted k-nearest-neighbour classification on frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Test features compared at once; bounds the similarity matrix at _CHUNK x N.
_CHUNK = 1024


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in percent of the vote of the k most similar training samples.

    Similarity is the cosine s; a neighbour votes for its label with weight exp(s / temperature)
    (Wu et al. 2018, instance discrimination; Caron et al. 2021, DINO).

    Args:
        train_features: [N, D].
        train_labels: [N] int64, from 0 on.
        test_features: [M, D].
        test_labels: [M] int64.
        k: neighbours; all N where there are fewer.
    """
    train = normalize(train_features.float(), dim=1)
    num_classes = int(torch.max(train_labels.max(), test_labels.max())) + 1
    k = min(k, len(train))
    correct = 0
    for features, labels in zip(
        test_features.split(_CHUNK), test_labels.split(_CHUNK), strict=True
    ):
        similarity, neighbour = (normalize(features.float(), dim=1) @ train.T).topk(k, dim=1)
        # Shifted by the nearest one's, which leaves the vote as it is at any temperature.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes = weight.new_zeros(len(features), num_classes)
        votes.scatter_add_(1, train_labels[neighbour], weight)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100 * correct / len(test_labels)
