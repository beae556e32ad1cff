"""The pooling of mask units, from one stage of Hiera to the next (Ryali et al. 2023, arXiv
2306.00989).

For every unit of u consecutive tokens of x [B, N, C], with s = q_stride and i < u / s::

    out[i] = max over r < s of x[r * u / s + i]                      # [B, N / s, C]
    argmax[i] = the first r that attains it, the first NaN if there is one
    dx[r * u / s + i] = dout[i] if r == argmax[i] else 0

Elements are compared and copied as integers of their own width, never widened on the CPU.

Bytes, with e per element: forward reads B N C e, writes B N C (e + 1) / s; backward reads
B N C (e + 1) / s and writes B N C e, each element of dx once. Saved for backward: argmax as uint8.
The other way, to find it again in x, would keep x alive for nothing else: x comes out of a linear
layer, which saves its input, and x holds s * e bytes for each of argmax's (8 in bfloat16 at s = 4);
backward would read them all. Peak extra memory: none.
"""

from fastssl.kernels.mask_unit_pool.op import mask_unit_pool

__all__ = ["mask_unit_pool"]
