"""Frozen features of a dataset, and what they tell without labels.

N samples, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.data.crops import EvaluationCrops, Request
from fastssl.data.loader import Loader


@torch.no_grad()
def extract_features(
    features_fn: Callable[[Tensor], Tensor],
    dataset: EvaluationCrops,
    batch_size: int = 256,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole dataset, in its order.

    Args:
        features_fn: normalised images [B, 3, H, W] on `device` -> [B, D]; in evaluation mode.
        dataset: the crops.
        batch_size: images per call.

    Returns:
        float32 [N, D] and int64 [N], both on `device`.
    """
    requests = [Request(part) for part in torch.arange(len(dataset)).split(batch_size)]
    features, labels = [], []
    for batch in Loader(dataset, requests, num_workers=num_workers, device=device):
        features.append(features_fn(batch.images).float())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)


def rankme(features: Tensor) -> float:
    """Effective rank of features [N, D], from 1 (collapsed) to min(N, D).

    The exponential of the entropy of the normalised singular values (Garrido et al. 2023, RankMe).
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(torch.special.entr(share).sum()).item()


def feature_std(features: Tensor) -> float:
    """Spread of the directions of features [N, D]: 0 is collapse, 1 is uniform on the sphere.

    The standard deviation per dimension of the unit-length features, averaged, times sqrt(D)
    (Chen and He 2021, SimSiam, figure 2).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5).item()
