"""The specification of info_nce, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [C, D], those of all processes
    negatives: Tensor | None,  # [M, D] or [N, M, D]
    temperature: Tensor,  # []
    first: int,  # the key of query i is number first + i
    in_batch_negatives: bool,
    normalize: bool,
) -> Tensor:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.to(dtype), keys.to(dtype)
        if normalize:
            queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
        positive = torch.arange(queries.shape[0], device=queries.device)
        if in_batch_negatives:
            positive = first + positive
            products = [queries @ keys.t()]
        else:
            positive = torch.zeros_like(positive)
            own = keys[first : first + queries.shape[0]]
            products = [(queries * own).sum(dim=1, keepdim=True)]
        if negatives is not None:
            negatives = negatives.to(dtype)
            if negatives.dim() == 2:
                products.append(queries @ negatives.t())
            else:
                products.append((negatives @ queries[:, :, None]).squeeze(2))
        return F.cross_entropy(torch.cat(products, dim=1) / temperature, positive)
