"""Frozen features of a dataset.

N samples, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.data.crops import Request
from fastssl.data.loader import CropsDataset, Loader
from fastssl.kernels.common import collectives


@torch.no_grad()
def extract_features(
    features_fn: Callable[[Tensor], Tensor],
    dataset: CropsDataset,
    batch_size: int = 256,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole dataset, in its order, on every rank.

    Of each batch a rank takes its share. Where the network is sharded, all must call it alike: a
    rank without a share computes one image, which does not count.

    Args:
        features_fn: normalised images [B, 3, H, W] on `device` -> [B, D]; in evaluation mode.
        dataset: labelled crops.
        batch_size: images per call on all ranks together.

    Returns:
        float32 [N, D] and int64 [N], both on `device`.
    """
    shares = [
        (part, part.tensor_split(collectives.world_size())[collectives.rank()])
        for part in torch.arange(len(dataset)).split(batch_size)
    ]
    requests = [Request(mine if len(mine) else part[:1]) for part, mine in shares]
    loader = Loader(dataset, requests, num_workers=num_workers, device=device)
    found: list[tuple[Tensor, ...]] = []
    for (_, mine), batch in zip(shares, loader, strict=True):
        images = batch.images
        # Broken files are left out of a batch, perhaps all of them.
        outputs = features_fn(images if len(batch) else images.new_zeros(1, *images.shape[1:]))
        count = min(len(mine), len(batch))
        own = (outputs.float(), batch.labels, batch.index)
        found.append(tuple(tensor[:count].cpu() for tensor in own))
    of_ranks = distributed.gather([torch.cat(column) for column in zip(*found, strict=True)])
    features, labels, index = (torch.cat(column) for column in zip(*of_ranks, strict=True))
    order = index.argsort()
    return features[order].to(device), labels[order].to(device)
