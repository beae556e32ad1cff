"""The specification of nt_xent, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group


def nt_xent(z0: Tensor, z1: Tensor, temperature: Tensor, group: Group = None) -> Tensor:
    dtype = torch.promote_types(z0.dtype, torch.float32)
    with torch.autocast(z0.device.type, enabled=False):
        z = F.normalize(torch.cat([z0, z1]).to(dtype), dim=1)  # [2N, D]
        everyone = collectives.all_gather_with_grad(z, group)
        row = torch.arange(z.shape[0], device=z.device)
        first = collectives.rank(group) * z.shape[0]
        itself = torch.arange(everyone.shape[0], device=z.device) == first + row[:, None]
        logits = (z @ everyone.t() / temperature).masked_fill(itself, -torch.inf)
        return F.cross_entropy(logits, first + row.roll(z0.shape[0]))
