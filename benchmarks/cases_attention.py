"""mask_unit_attention at the shapes of Hiera's stages and of MAE's encoders and decoders.

Against every arrangement of torch's, each from the packed projection's output to the next one's
input: the scores written out (the reference), torch's attention on four dimensions (its fused
kernel) and on five, as the official Hiera calls it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import (
    FORWARD,
    FORWARD_BACKWARD,
    Case,
    Contender,
    forward_backward,
    forward_only,
)
from fastssl.functional import mask_unit_attention

BATCH, UNITS = 8, 19  # of 49 units, 19 are seen at a mask ratio of 0.6

# name: (units per image, tokens per unit, q_stride, heads, channels per head)
SHAPES = {
    "hiera_base/stage_1": (UNITS, 64, 1, 1, 96),  # Hiera-T, -S and -B alike
    "hiera_base/pool_1": (UNITS, 64, 4, 2, 96),
    "hiera_base/stage_2": (UNITS, 16, 1, 2, 96),
    "hiera_base/pool_2": (UNITS, 16, 4, 4, 96),
    "hiera_large/stage_1": (UNITS, 64, 1, 2, 72),
    "hiera_large/pool_1": (UNITS, 64, 4, 4, 72),
    "hiera_large/stage_2": (UNITS, 16, 1, 4, 72),
    "hiera_large/pool_2": (UNITS, 16, 4, 8, 72),
    "vit_base/encoder": (1, 50, 1, 12, 64),
    "hiera_base/stage_3": (1, 80, 1, 4, 96),
    "vit_base/full": (1, 196, 1, 12, 64),
    "mae/decoder": (1, 196, 1, 16, 32),
}
QUICK = {"hiera_base/pool_1": (2, 16, 4, 2, 24)}


def cases(quick: bool, scale: int) -> list[Case]:
    return [
        _case(name, *shape, 2 if quick else BATCH * scale, direction)
        for name, shape in (QUICK if quick else SHAPES).items()
        for direction in (FORWARD, FORWARD_BACKWARD)
    ]


def sdpa(qkv: Tensor, num_heads: int, unit_size: int, q_stride: int, fold: bool) -> Tensor:
    """torch's attention with the units in the batch, [B * U, H, u, d], or in a dimension of their
    own, [B, H, U, u, d]."""
    batch, num_tokens, _ = qkv.shape
    if fold:
        # [B * U, u, 3, H, d] -> [3, B * U, H, u, d]
        qkv = qkv.view(-1, unit_size, 3, num_heads, qkv.shape[2] // (3 * num_heads))
        qkv = qkv.permute(2, 0, 3, 1, 4)
    else:
        # [B, U, u, 3, H, d] -> [3, B, H, U, u, d]
        qkv = qkv.view(batch, -1, unit_size, 3, num_heads, qkv.shape[2] // (3 * num_heads))
        qkv = qkv.permute(3, 0, 4, 1, 2, 5)
    q, k, v = qkv
    if q_stride > 1:
        q = q.unflatten(-2, (q_stride, -1)).max(-3).values
    out = F.scaled_dot_product_attention(q, k, v)
    out = out.transpose(1, 2) if fold else out.permute(0, 2, 3, 1, 4)
    return out.reshape(batch, num_tokens // q_stride, -1)


def _case(
    name: str,
    units: int,
    unit_size: int,
    q_stride: int,
    heads: int,
    head_dim: int,
    batch: int,
    direction: str,
) -> Case:
    tokens, dim = units * unit_size, heads * head_dim
    settings = {"num_heads": heads, "unit_size": unit_size, "q_stride": q_stride}

    def make_inputs(device: torch.device) -> tuple:
        options = {"device": device, "dtype": torch.bfloat16}
        qkv = torch.randn(batch, tokens, 3 * dim, **options, requires_grad=True)
        return qkv, torch.randn(batch, tokens // q_stride, dim, **options)

    def contenders(device: torch.device) -> dict[str, Contender]:
        def reference(qkv: Tensor) -> Tensor:
            return mask_unit_attention(qkv, **settings, backend="reference")

        functions = {
            "eager": reference,
            "4-D": lambda qkv: sdpa(qkv, heads, unit_size, q_stride, fold=True),
            "5-D": lambda qkv: sdpa(qkv, heads, unit_size, q_stride, fold=False),
            "compiled": torch.compile(reference),
            "fastssl": lambda qkv: mask_unit_attention(qkv, **settings),
        }
        if direction == FORWARD:
            return {
                name: forward_only(lambda qkv, _, f=function: f(qkv))
                for name, function in functions.items()
            }
        return {name: forward_backward(function) for name, function in functions.items()}

    product = 2 * batch * tokens // q_stride * unit_size * dim
    moved = 2 * batch * tokens * dim
    return Case(
        name=f"mask_unit_attention/{name}/bfloat16/{direction}",
        shape=f"B={batch} {units} x {unit_size}->{unit_size // q_stride} {heads} x {head_dim}",
        dtype="bfloat16",
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "4-D", "5-D", "compiled")},
        tolerance=2e-2,
        bytes_moved=(3 * moved + moved // q_stride) * (1 if direction == FORWARD else 3),
        flops=product * (2 if direction == FORWARD else 7),
        op="mask_unit_attention",
    )
