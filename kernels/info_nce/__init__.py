"""InfoNCE of queries against keys and a queue (van den Oord et al. 2018, arXiv 1807.03748).

With N queries, keys, M negatives and unit vectors q, k of D dimensions::

    s[i, j] = q[i] . k[j] / temperature                  # j over keys, then negatives
    loss = mean_i(log sum_j exp(s[i, j]) - s[i, i])
    dq[i] = (sum_j p[i, j] k[j] - k[i]) / (N temperature)             # p = softmax(s)
    dk[j] = (sum_i p[i, j] q[i] - q[j]) / (N temperature)
    dtemperature = -sum_i(q[i] . dq[i]) / temperature

Keys pass in blocks: one product into a buffer that stays in the cache, a running softmax, and where
a gradient is wanted the product sum_j p[i, j] k[j] with the block at hand, which is all that dq and
dtemperature take. dk computes the products of queries and keys (never those with negatives) again.

FLOPs: 2 N (N + M) D forward, twice that with the gradient of the queries; 4 N N D backward where
keys want a gradient, else none. Bytes: keys and negatives once forward, keys once more backward.

Saved for backward: the float32 gradient of the queries, 4 N D bytes; queries, keys and 4 N bytes if
keys want a gradient. Peak extra memory on a CPU: a tile of scores of 256 KB per thread, the sums of
up to 16 slices of the keys where queries are fewer than 2,048 (2 MB in all with 128 dimensions),
float32 copies of queries and keys where they are normalised or narrower. On a GPU: the sums of as
many slices as give every processor two programs. Nothing grows with N x N or N x M.
"""

from fastssl.kernels.info_nce.op import info_nce

__all__ = ["info_nce"]
