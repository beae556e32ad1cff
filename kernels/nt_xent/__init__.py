"""NT-Xent, SimCLR's loss (Chen et al. 2020, arXiv 2002.05709).

With z [2N, D] the unit vectors of both views, one view after the other, and pair(i) the same image
in the other view::

    s[i, j] = z[i] . z[j] / temperature
    loss = mean_i(log sum_{j != i} exp(s[i, j]) - s[i, pair(i)])
    dz[i] = (sum_{j != i} (p[i, j] + p[j, i]) z[j] - 2 z[pair(i)]) / (2N temperature)
    dtemperature = -sum_i(z[i] . dz[i]) / (2 temperature)     # p = softmax of s over j != i

Scores pass in tiles that stay in the cache. s is symmetric: a CPU computes the tiles of one
triangle and takes row and column sums from each; backward does them again and multiplies each tile
and its transpose with the features. FLOPs: (2N)^2 D forward, 3 (2N)^2 D backward; stored logits
take 2 and 4. As unit vectors bound the scores, temperatures above 0.024 need no shift and hence one
exponential per pair of rows. A GPU computes all tiles, and dz in one kernel: 2 and 4 as well, but
nothing is stored.

Across processes the features travel once; backward, one number per row does (p[j, i] of other
ranks' rows), and no gradients.

Saved for backward: z0, z1, 8N bytes, and the gathered features of several processes. Peak extra
memory on a CPU: the float32 unit vectors and a tile of 256 KB per thread. On a GPU: both views in
one tensor, float32 sums of the gradient. Nothing grows with N x N.
"""

from fastssl.kernels.nt_xent.op import nt_xent

__all__ = ["nt_xent"]
