"""Features brought to mean 0 and deviation 1 per dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group

_CHUNK = 8192


@dataclass(frozen=True)
class Standardize:
    """Called, it brings features [..., D] to float32 (x - mean) * scale."""

    mean: Tensor  # [D] float32
    scale: Tensor  # [D] float32

    @classmethod
    def fit(cls, features: Tensor, group: Group = "") -> Standardize:
        """Mean and deviation of the features [..., D] of all ranks, from float64 sums.

        A dimension that is constant over them says nothing, whatever its rounding noise: its
        scale is 0.
        """
        rows = features.detach().flatten(0, -2)
        count = collectives.all_reduce_sum(torch.tensor(len(rows), device=rows.device), group)
        total = sum(part.double().sum(dim=0) for part in rows.split(_CHUNK))
        mean = collectives.all_reduce_sum(total, group) / count
        square = sum((part.double() - mean).square().sum(dim=0) for part in rows.split(_CHUNK))
        std = (collectives.all_reduce_sum(square, group) / count).sqrt()
        scale = torch.where(std > 1e-6 * (mean.abs() + 1e-6), 1 / std, 0.0)
        return cls(mean.float(), scale.float())

    @classmethod
    def identity(cls, features: Tensor) -> Standardize:
        mean = torch.zeros(features.shape[-1], device=features.device)
        return cls(mean, torch.ones_like(mean))

    def __call__(self, features: Tensor) -> Tensor:
        return (features.detach().float() - self.mean) * self.scale
