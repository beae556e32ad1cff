"""Kozachenko-Leonenko regulariser (Sablayrolles et al. 2019, arXiv 1806.03198).

With N rows (of all processes) x normalised to length 1::

    distance_i = min_{j != i} |x_i - x_j|
    loss = -mean_i log(distance_i + eps)

The neighbour is the row of the largest product, the lowest of equal ones; the distance is taken
from the difference, so that near duplicates keep their digits. On cpp and Triton the products of
this process's n rows pass by in tiles, of which a row keeps the largest product and its place: the
n x N matrix never exists. Backward gathers: with w_i = -1 / (n (distance_i + eps) distance_i) and
j(i) the neighbour, the gradient of unit row k is w_k (x_k - x_j(k)) + sum_{i: j(i) = k} w_i (x_k -
x_i), the sum in the order of rows sorted by neighbour, without atomics, and then passes the
normalisation. Duplicates have weight 0.

FLOPs: 2 n N D forward (cpp, one process: half, by the symmetry), about 10 n D backward. Bytes, with
e per feature: forward reads N D e, writes 4 N D (unit rows), which the search reads at least once
and the distances twice, 8 n D; backward reads 12 n D and writes n D e. Saved for backward: 4 N D,
16 n. Peak extra memory beyond that: per thread a tile of 64k floats and 8 n (cpp), or 8 n per slice
of columns (Triton); backward 28 N. The reference stores 4 n N.

Processes: n D e gathered once forward, 12 n backward.
"""

from fastssl.kernels.koleo.op import koleo

__all__ = ["koleo"]
