"""The gradient of a reference, for ops that were called with backend="reference" by name."""

from collections.abc import Callable

import torch
from torch import Tensor


def reference_gradients(
    ctx: object, function: Callable[..., Tensor], inputs: tuple, grad_output: Tensor
) -> list[Tensor | None]:
    """One gradient per input of `function`, None where ctx.needs_input_grad says so."""
    wanted = ctx.needs_input_grad[: len(inputs)]
    with torch.enable_grad():
        leaves = [
            value.detach().requires_grad_(want) if isinstance(value, Tensor) else value
            for value, want in zip(inputs, wanted, strict=True)
        ]
        output = function(*leaves)
        targets = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(output, targets, grad_output.to(output.dtype)))
    return [next(grads) if want else None for want in wanted]
