"""Random masking of a masked autoencoder (He et al. 2021, arXiv 2111.06377).

With B images, N tokens and K = len_keep of them kept::

    ids_shuffle = stable argsort of noise[b]     # -0.0 equals 0.0, NaN is last, ties by index
    ids_keep[b] = ids_shuffle[:K]
    ids_restore[b, n] = rank of token n in ids_shuffle
    mask[b, n] = 1 if ids_restore[b, n] >= K else 0

in one pass. The mask follows MAE: 1 means removed (Hiera's masks mean the opposite).

Bytes, with e per element of noise: reads BNe, writes 4B(2N + K). Not differentiable; no extra
memory beyond the outputs, except sort buffers of one row per CPU thread and the reference's
int64 indices.
"""

from fastssl.kernels.random_masking.op import random_masking

__all__ = ["random_masking"]
