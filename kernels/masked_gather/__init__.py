"""Encoder input of a masked autoencoder, in one pass (He et al. 2021, arXiv 2111.06377).

With B images, P prefix tokens (class token, registers), K visible tokens, N tokens in all and D
embedding dimensions::

    n = ids_keep[b, k]
    out[b, P + k] = x[b, P + n] + pos[P + n]
    out[b, p] = x[b, p] + pos[p]                 # p < P

The indices in a row of `ids_keep` must be unique (with a repeated one the gradients are undefined)
and lie in 0 .. N-1 (the CPU checks this, a GPU does not, since it would have to wait). Backward is
therefore a copy: row n of dx is row ids_restore[b, n] of dout, or zero where that is not below K;
dpos is the sum of dx over images; both come from one pass, without atomics. Without `ids_restore`
the inverse of `ids_keep` is made first.

Bytes, with e per element of x and o per element of out: forward reads B(P+K)De and writes
B(P+K)Do; backward reads B(P+K)Do and writes B(P+N)De. Saved for backward: ids_restore if it was
given, else ids_keep. Peak extra memory: backward holds the int32 inverse [B, N] where ids_restore
was not given, and (P+N)D float32 of dpos where it is wanted (times the number of batch slices on
a GPU, `triton_utils.batch_slices`).
"""

from fastssl.kernels.masked_gather.op import masked_gather

__all__ = ["masked_gather"]
