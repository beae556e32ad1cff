"""LayerNorm in one pass with the residual add before it and the cast after it."""

from torch import Tensor, nn

from fastssl import functional
from fastssl.nn.linear import is_plain


def _is_fused(norm: nn.Module, x: Tensor) -> bool:
    return (
        is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == x.shape[-1:]
        and norm.bias is not None
    )


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); of a LayerNorm under autocast in the autocast dtype, for the linear that follows."""
    if not _is_fused(norm, x):
        return norm(x)
    return functional.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)[1]


def add_layer_norm(
    norm: nn.Module,
    x: Tensor,  # [B, N, D]
    branch: Tensor,  # as x
    *,
    gamma: Tensor | None = None,  # [D]
    scale: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:
    """y = x + branch * gamma * scale and norm(y), the latter as from `layer_norm`."""
    if _is_fused(norm, x):
        return functional.add_layer_norm(
            x, branch, norm.weight, norm.bias, norm.eps, gamma=gamma, scale=scale
        )
    if gamma is not None:
        branch = branch * gamma
    if scale is not None:
        branch = branch * scale.view(-1, *(1,) * (x.dim() - 1))
    x = x + branch
    return x, norm(x)
