"""mask_unit_pool at the two poolings of Hiera-T's encoder in an MAE step at batch 8.

19 of 49 mask units are seen (mask ratio 0.6), of 64 and then 16 tokens; 2 x 2 tokens become one.
B images, N tokens, C channels. The reference is `torch.max(dim)`, as the official Hiera pools.
"""

import torch
from torch import Tensor

from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, op_case
from fastssl import functional as F

Q_STRIDE = 4
# name: (B, N, C), tokens per unit
SHAPES = {"pool_1": ((8, 1216, 192), 64), "pool_2": ((8, 304, 384), 16)}
QUICK = {"pool_1": ((2, 32, 24), 16)}
DTYPES = (torch.float32, torch.bfloat16)


def cases(quick: bool, scale: int) -> list[Case]:
    return [
        mask_unit_pool(name, (scale * batch, *sizes), unit_size, dtype, direction)
        for name, ((batch, *sizes), unit_size) in (QUICK if quick else SHAPES).items()
        for dtype in DTYPES
        for direction in (FORWARD, FORWARD_BACKWARD)
    ]


def mask_unit_pool(
    name: str, shape: tuple[int, int, int], unit_size: int, dtype: torch.dtype, direction: str
) -> Case:
    batch, num_tokens, dim = shape

    def make_inputs(device: torch.device) -> tuple:
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        if direction == FORWARD:
            return (x,)
        pooled = (batch, num_tokens // Q_STRIDE, dim)
        return x, torch.randn(pooled, device=device).to(dtype)

    def function(x: Tensor, backend: str | None) -> Tensor:
        return F.mask_unit_pool(x, unit_size=unit_size, q_stride=Q_STRIDE, backend=backend)

    pooled = batch * num_tokens * dim // Q_STRIDE
    # One direction moves x or dx, and out or dout; argmax is written by one and read by the other.
    bytes_moved = pooled * (Q_STRIDE + 1) * dtype.itemsize
    if direction == FORWARD_BACKWARD:
        bytes_moved = 2 * (bytes_moved + pooled)
    suffix = "/forward" if direction == FORWARD else ""
    return op_case(
        f"mask_unit_pool/{name}{suffix}",
        function,
        make_inputs,
        op="mask_unit_pool",
        shape=f"B={batch} N={num_tokens} C={dim} u={unit_size} s={Q_STRIDE}",
        dtype=dtype,
        direction=direction,
        bytes_moved=bytes_moved,
    )
