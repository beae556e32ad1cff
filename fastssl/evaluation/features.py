"""Frozen features of a dataset.

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
