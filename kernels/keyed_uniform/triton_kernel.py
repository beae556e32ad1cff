"""keyed_uniform in Triton. B samples, Q = ceil(num / 4) Philox blocks of each."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_philox import keyed_words, signed_word, uniform
from fastssl.kernels.common.triton_utils import AotCase, cdiv


@dataclass(frozen=True)
class Config:
    """One program makes BLOCK Philox blocks, four numbers each."""

    BLOCK: int = 256
    num_warps: int = 4


CONFIG = Config()


# The key's value says nothing about the code, so a new epoch must not mean a new compilation.
@triton.jit(do_not_specialize=["key0", "key1"])
def _keyed_uniform_kernel(
    samples_ptr,  # [B] int64
    out_ptr,  # [B, num] float32
    B,
    num,
    key0,
    key1,
    BLOCK: tl.constexpr,
):
    blocks_per_row = tl.cdiv(num, 4)
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, q = t // blocks_per_row, t % blocks_per_row
    sample = tl.load(samples_ptr + b, mask=b < B, other=0)
    word0, word1, word2, word3 = keyed_words(sample, q, key0, key1)
    # join adds an innermost axis: [BLOCK, 2, 2] in the order of the words.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    out = uniform(tl.reshape(words, (BLOCK, 4)))
    p = q[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + b[:, None] * num + p, out, mask=(b < B)[:, None] & (p < num))


def keyed_uniform(samples: Tensor, key: tuple[int, int], out: Tensor) -> None:
    """Fill out [B, num]; `key` is that of common.philox.derive_key."""
    batch, num = out.shape
    if out.numel() == 0:
        return
    grid = (cdiv(batch * cdiv(num, 4), CONFIG.BLOCK),)
    key0, key1 = (signed_word(word) for word in key)
    _keyed_uniform_kernel[grid](
        samples, out, batch, num, key0, key1, BLOCK=CONFIG.BLOCK, num_warps=CONFIG.num_warps
    )


def aot_cases() -> list[AotCase]:
    return [
        AotCase(
            _keyed_uniform_kernel,
            {"samples_ptr": "*i64", "out_ptr": "*fp32"}
            | {"B": "i32", "num": "i32", "key0": "i32", "key1": "i32"},
            {"BLOCK": CONFIG.BLOCK},
            CONFIG.num_warps,
        )
    ]
