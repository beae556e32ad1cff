"""Clipping of gradients, whole or parameter by parameter, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

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
    never leave the device, one for all parameters.
    """
    if by not in CLIPPED:
        raise ValueError(f"by must be one of {', '.join(CLIPPED)}, got {by!r}")
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters:
        return torch.zeros(())
    gradients = [local(p.grad) for p in parameters]
    norms = whole_norms(gradients, parameters)
    norm = torch.linalg.vector_norm(norms)
    if max_norm is not None:
        factors = (max_norm / ((norm if by == "whole" else norms) + 1e-6)).clamp(max=1.0)
        if all(gradient.dtype == torch.float32 for gradient in gradients):
            # One launch for many on a GPU, where both are of one dtype.
            factors = factors.float()
        torch._foreach_mul_(gradients, factors if by == "whole" else list(factors.unbind()))
    return norm.float()
