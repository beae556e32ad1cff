"""Attention within mask units, with query pooling, from one packed tensor to another.

For every unit of u consecutive tokens and every head, on qkv [B, N, 3 * D] ->  out [B, N / s, D]::

    q_i = max over r < s of q[r * u / s + i]        (s = q_stride; the identity for s = 1)
    out = softmax(q k^T / sqrt(D / H)) v

A unit is one tile (small ones are packed several to a tile): scores never leave the cache, no
tensor is permuted, the pooled queries and their argmax are not stored. Backward computes the scores
and the maxima again; nothing depends on the order in which units run.

Bytes, with e per element: forward reads 3 B N D e and writes B N D e / s; backward reads
3 B N D e + B N D e / s and writes 3 B N D e. FLOPs: 4 B N u D / s forward, 10 B N u D / s backward
(8 of them and the scores again). Saved for backward: qkv. Peak extra memory: on the CPU some
hundred KB per thread, 2 MB at most, kept for the next call; on a GPU none, but for units too large
for one tile in backward, which take 8 bytes per query and head.
"""

from fastssl.kernels.mask_unit_attention.op import mask_unit_attention

__all__ = ["mask_unit_attention"]
