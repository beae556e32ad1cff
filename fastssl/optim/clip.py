"""Clipping of gradients, whole or parameter by parameter, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastssl.optim.layerwise import local, whole_norms

CLIPPED = ("whole", "parameter")


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float | None, *, by: str = "whole"
) -> Tensor:
    """Clip the gradients in place; the norm of the whole gradient, as it was before, is returned.

    "whole": that norm is at most `max_norm` afterwards, and every direction stays what it was.
    "parameter": the norm of each parameter's gradient by itself is, as DINO trains
    (arXiv:2104.14294). None clips nothing. Norms are those of the whole tensors under FSDP2, and
    never leave the device.
    """
    if by not in CLIPPED:
        raise ValueError(f"by must be one of {', '.join(CLIPPED)}, got {by!r}")
    parameters = [p for p in parameters if p.grad is not None]
    if max_norm is not None and by == "parameter":
        gradients = [local(p.grad) for p in parameters]
        norms = whole_norms(gradients, parameters)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
        return norms.square().sum().sqrt()
    norm = get_total_norm([p.grad for p in parameters])
    if max_norm is not None:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
