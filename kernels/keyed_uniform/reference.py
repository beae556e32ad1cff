"""The specification of keyed_uniform, in exact int64 arithmetic of eager PyTorch."""

import torch
from torch import Tensor

from fastssl.kernels.common.philox import derive_key, keyed_words


def keyed_uniform(
    samples: Tensor,  # [B] int64
    num: int,
    seed: int,
    epoch: int,
    view: int,
    stream: int,
) -> Tensor:  # [B, num] float32
    blocks = torch.arange((num + 3) // 4, device=samples.device)
    words = keyed_words(samples, blocks, derive_key(seed, epoch, view, stream))
    return (words.flatten(1)[:, :num] >> 8).float() * 2.0**-24
