"""random_masking in Triton. B images, N tokens, K kept ones.

The rank of a token is the number of tokens before it. Counting them needs N^2 comparisons and no
synchronisation; a bitonic sort of 4096 packed pairs needs a fifth of the arithmetic, but 350
barriers and ten seconds of compilation for every power of two.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase, cdiv


@dataclass(frozen=True)
class Config:
    """One program ranks BLOCK tokens against all, BLOCK at a time."""

    BLOCK: int = 64
    num_warps: int = 8


CONFIG = Config()


@triton.jit
def _sort_keys(row_ptr, n, N):
    """The noise's order as int32: -0.0 equals 0.0, a NaN is above infinity, padding above that."""
    noise = tl.load(row_ptr + n, mask=n < N, other=0.0)
    # Integers throughout: float arithmetic may flush subnormals to zero.
    if noise.dtype == tl.bfloat16:
        bits = noise.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = noise.to(tl.float32).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F800001, key)
    return tl.where(n < N, key, 0x7FFFFFFF)


@triton.jit
def _random_masking_kernel(
    noise_ptr,  # [B, N]
    ids_keep_ptr,  # [B, K] int32
    ids_restore_ptr,  # [B, N] int32
    mask_ptr,  # [B, N] float32
    N,
    K,
    BLOCK: tl.constexpr,
):
    num_tiles = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // num_tiles).to(tl.int64)
    start = (tl.program_id(0) % num_tiles) * BLOCK
    offsets = tl.arange(0, BLOCK)
    row_ptr = noise_ptr + b * N
    n = start + offsets
    key = _sort_keys(row_ptr, n, N)[:, None]
    before = tl.zeros((BLOCK, BLOCK), tl.int32)
    # An equal key comes before this one if its index does: key + 1 in the tiles to the left.
    for left in range(0, start, BLOCK):
        before += (_sort_keys(row_ptr, left + offsets, N)[None, :] < key + 1).to(tl.int32)
    earlier = (offsets[None, :] < offsets[:, None]).to(tl.int32)
    before += (_sort_keys(row_ptr, n, N)[None, :] < key + earlier).to(tl.int32)
    for right in range(start + BLOCK, N, BLOCK):
        before += (_sort_keys(row_ptr, right + offsets, N)[None, :] < key).to(tl.int32)
    rank = tl.sum(before, axis=1)
    valid = n < N
    tl.store(ids_restore_ptr + b * N + n, rank, mask=valid)
    tl.store(mask_ptr + b * N + n, (rank >= K).to(tl.float32), mask=valid)
    tl.store(ids_keep_ptr + b * K + rank, n, mask=valid & (rank < K))


def random_masking(noise: Tensor, ids_keep: Tensor, ids_restore: Tensor, mask: Tensor) -> None:
    """Fill ids_keep [B, K], ids_restore [B, N] and mask [B, N]."""
    batch, num_tokens = noise.shape
    if noise.numel() == 0:
        return
    _random_masking_kernel[(batch * cdiv(num_tokens, CONFIG.BLOCK),)](
        noise,
        ids_keep,
        ids_restore,
        mask,
        num_tokens,
        ids_keep.shape[1],
        BLOCK=CONFIG.BLOCK,
        num_warps=CONFIG.num_warps,
    )


def aot_cases() -> list[AotCase]:
    return [
        AotCase(
            _random_masking_kernel,
            {"noise_ptr": "*fp32", "ids_keep_ptr": "*i32", "ids_restore_ptr": "*i32"}
            | {"mask_ptr": "*fp32", "N": "i32", "K": "i32"},
            {"BLOCK": CONFIG.BLOCK},
            CONFIG.num_warps,
        )
    ]
