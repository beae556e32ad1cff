"""Philox4x32-10 for Triton kernels; the integers are those of common/philox.py."""

import triton
import triton.language as tl


@triton.jit
def keyed_words(sample, block, key0, key1):
    """The four uint32 words of `block` of `sample` (int64), tensors of one shape.

    key0 and key1 are the key's words, as int32 bit patterns (`signed_word`).
    """
    zero = tl.zeros_like(block).to(tl.uint32)
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key0 = zero + key0.to(tl.uint32, bitcast=True)
    key1 = zero + key1.to(tl.uint32, bitcast=True)
    return tl.philox_impl(block.to(tl.uint32), zero, low, high, key0, key1, 10)


@triton.jit
def uniform(word):
    """A uint32 word as a float32 in [0, 1), on a grid of 2**-24."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


def signed_word(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that a launch always passes an i32."""
    return word - 2**32 if word >= 2**31 else word
