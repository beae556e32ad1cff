"""The specification of barlow_twins, vicreg and covariance_loss, in eager PyTorch. N samples of all
processes, equally many on each, D features."""

import torch
from torch import Tensor

from fastssl.kernels.common.collectives import Group, all_gather_with_grad


def whole_batch(z: Tensor, group: Group) -> Tensor:  # [N, D]
    """The samples of all processes, float32 (float64 stays)."""
    return all_gather_with_grad(z.to(torch.promote_types(z.dtype, torch.float32)), group)


def off_diagonal_squares(matrix: Tensor) -> Tensor:  # [D, D] -> []
    return matrix.square().sum() - matrix.diagonal().square().sum()


def standardized(z: Tensor, eps: float) -> Tensor:
    """Columns with mean 0 and (biased) variance 1, a batch normalisation without parameters."""
    centered = z - z.mean(dim=0)
    return centered / (centered.square().mean(dim=0) + eps).sqrt()


def barlow_twins(z0: Tensor, z1: Tensor, lambd: float, eps: float, group: Group = None) -> Tensor:
    y0, y1 = (standardized(whole_batch(z, group), eps) for z in (z0, z1))
    with torch.autocast(z0.device.type, enabled=False):
        correlation = y0.T @ y1 / y0.shape[0]
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + lambd * off_diagonal_squares(correlation)


def covariance_term(centered: Tensor) -> Tensor:  # [N, D] -> []
    count = max(centered.shape[0] - 1, 1)
    with torch.autocast(centered.device.type, enabled=False):
        covariance = centered.T @ centered / count
    return off_diagonal_squares(covariance) / centered.shape[1]


def covariance_loss(z: Tensor, group: Group = None) -> Tensor:
    z = whole_batch(z, group)
    return covariance_term(z - z.mean(dim=0))


def vicreg(
    z0: Tensor,
    z1: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    eps: float,
    group: Group = None,
) -> Tensor:
    views = [whole_batch(z, group) for z in (z0, z1)]
    loss = sim_coeff * (views[0] - views[1]).square().mean()
    for z in views:
        centered = z - z.mean(dim=0)
        variance = centered.square().sum(dim=0) / max(z.shape[0] - 1, 1)
        loss = loss + std_coeff / 2 * (1 - (variance + eps).sqrt()).clamp(min=0).mean()
        loss = loss + cov_coeff * covariance_term(centered)
    return loss
