"""The specification of koleo, in eager PyTorch."""

import torch
from torch import Tensor

from fastssl.kernels.common.collectives import Group, all_gather_with_grad, rank

# A row shorter than this counts as it is instead of being stretched to length 1.
MIN_LENGTH = 1e-8


def koleo(x: Tensor, eps: float, group: Group = None) -> Tensor:  # [N, D] -> []
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    own = x / x.norm(dim=1, keepdim=True).clamp(min=MIN_LENGTH)
    rows = all_gather_with_grad(own, group)
    if rows.shape[0] == 1:
        return own.sum() * 0.0
    index = torch.arange(own.shape[0], device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        similarity = own @ rows.T
        similarity[index, index + rank(group) * own.shape[0]] = -torch.inf
        nearest = similarity.argmax(dim=1)
    squares = (own - rows[nearest]).square().sum(dim=1)
    # The root has no finite slope at 0: duplicates count, but pull and push nothing.
    apart = squares != 0
    distance = torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)
    return -(distance + eps).log().mean()
