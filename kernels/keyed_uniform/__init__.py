"""Uniform random numbers keyed by what they are for, the same on every backend, rank and restart.

Philox4x32-10 (Salmon et al., SC 2011). With B samples and num positions p::

    key = philox(counter=(epoch, view, stream, 0), key=(seed low, seed high))[:2]
    word = philox(counter=(p // 4, 0, samples[b] low, samples[b] high), key)[p % 4]
    out[b, p] = (word >> 8) * 2**-24

where low and high are the 32-bit halves. A row depends on its own sample and on the four integers
only, not on the batch it came in; out lies in [0, 1 - 2**-24] on a grid of 2**-24.

Bytes: reads 8B, writes 4B num. Not differentiable; no extra memory except in the reference, which
computes in int64 and holds about 20 times the output.
"""

from fastssl.kernels.keyed_uniform.op import keyed_uniform

__all__ = ["keyed_uniform"]
