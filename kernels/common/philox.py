"""Philox4x32-10, a counter-based random number generator (Salmon et al., SC 2011).

One block is four 32-bit words, a pure function of a 128-bit counter and a 64-bit key, so every
number can be made by anyone at any time: no state, no order, no rank. This file holds the exact
integer form in Python (`philox`, for keys) and in int64 tensors (`philox_tensor`, the reference of
every keyed kernel); csrc/cpu/philox.h and common/triton_philox.py hold the fast forms.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """One block in Python integers, all of them in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & MASK32, p0 >> 32 ^ c3 ^ k1, p0 & MASK32
        k0, k1 = k0 + WEYL[0] & MASK32, k1 + WEYL[1] & MASK32
    return c0, c1, c2, c3


def derive_key(seed: int, epoch: int, view: int, stream: int) -> tuple[int, int]:
    """The key of one use of randomness; the low half of `seed` is the first word of its key."""
    return philox((epoch, view, stream, 0), (seed & MASK32, seed >> 32))[:2]


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product; splitting `word` keeps int64 from overflowing."""
    low, high = multiplier * (word & 0xFFFF), multiplier * (word >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & MASK32


def philox_tensor(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block per element of the int64 tensors `counter` (broadcast), words in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + WEYL[0] & MASK32, k1 + WEYL[1] & MASK32
    return c0, c1, c2, c3


def keyed_words(samples: Tensor, blocks: Tensor, key: tuple[int, int]) -> Tensor:
    """Words of `blocks` [Q] of every sample [B]: int64 [B, Q, 4] in [0, 2^32).

    The counter of a block is (block, 0, low half of the sample, high half of the sample).
    """
    s = samples[:, None]
    counter = (blocks[None, :], torch.zeros_like(s), s & MASK32, (s >> 32) & MASK32)
    return torch.stack(torch.broadcast_tensors(*philox_tensor(counter, key)), dim=-1)
