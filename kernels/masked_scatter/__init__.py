"""Decoder input of a masked autoencoder, in one pass (He et al. 2021, arXiv 2111.06377).

With B images, P prefix tokens (class token, registers), K visible tokens, N tokens in all and D
embedding dimensions::

    r = ids_restore[b, n]                        # the rank of token n; visible ones have r < K
    out[b, P + n] = (x[b, P + r] if r < K else mask_token) + pos[P + n]
    out[b, p] = x[b, p] + pos[p]                 # p < P

Each row of `ids_restore` is a permutation of 0 .. N-1, so every visible token is used exactly once
and backward is a copy, not a sum: dx is one row of dout, dmask_token the sum of the rows of masked
tokens, dpos the sum over images; all three come from one pass over dout.

Bytes, with e per element of x and o per element of out: forward reads B(P+K)De and writes
B(P+N)Do, backward the reverse. Saved for backward: ids_restore alone. Peak extra memory: backward
holds (P+N)D float32 partial sums of dmask_token, and as many of dpos where it is wanted (times the
number of batch slices on a GPU, `triton_utils.batch_slices`).
"""

from fastssl.kernels.masked_scatter.op import masked_scatter

__all__ = ["masked_scatter"]
