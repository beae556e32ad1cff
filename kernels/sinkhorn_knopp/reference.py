"""The specification of sinkhorn_knopp, in eager PyTorch."""

import torch
from torch import Tensor

from fastssl.kernels.common.collectives import Group, all_reduce_max, all_reduce_sum


def log_sum_over_ranks(log_values: Tensor, group: Group) -> Tensor:
    """log of the sum over ranks of exp(log_values)."""
    top = all_reduce_max(log_values, group).clamp(min=torch.finfo(log_values.dtype).min)
    return top + all_reduce_sum((log_values - top).exp(), group).log()


def sinkhorn_knopp(
    logits: Tensor,  # [B, K]
    num_rows: Tensor | None,  # [] int
    temperature: float,
    num_iters: int,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:  # assignment [B, K], log_u [K], log_v [B]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype) / temperature
    in_use = torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    if num_rows is not None:
        in_use = torch.arange(scores.shape[0], device=scores.device) < num_rows
    # There may be anything, NaN included, in rows that are not in use.
    scores = torch.where(in_use[:, None], scores, 0.0)
    log_v = torch.zeros_like(scores[:, 0])
    for _ in range(num_iters):
        columns = scores + torch.where(in_use, log_v, -torch.inf)[:, None]
        mass = log_sum_over_ranks(columns.logsumexp(dim=0), group)
        # A prototype without any mass, as where no row is in use, stays as it is.
        log_u = torch.where(mass == -torch.inf, 0.0, -mass)
        log_v = torch.where(in_use, -(scores + log_u).logsumexp(dim=1), 0.0)
    assignment = torch.where(in_use[:, None], (scores + log_u).softmax(dim=1), 0.0)
    return assignment, log_u, log_v
