"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230).

With N samples (of all processes), D features and y = (z - mean) / sqrt(var + eps) per column::

    C = y0^T y1 / N                                                      # [D, D]
    loss = sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2
    sum_ij C_ij^2 = <y0 y0^T, y1 y1^T> / N^2                             # two [N, N] matrices

For N < D the last line stands in for C, and its gradient is y1 y1^T y0: no D x D matrix exists.
Otherwise C is the one D x D matrix, stored with diagonal 0. common/gram.py has the steps.

FLOPs of the products: N < D 4 N^2 D forward (less by the symmetry), 4 N^2 D backward, against 12 N
D^2 with C; otherwise 2 N D^2 and 4 N D^2. Bytes, with e per feature: forward reads 2 N D e and
writes 8 N D (y), which the products read; backward reads y and the products, 32 N D, and writes
2 N D e. Saved for backward: y, 8 N D, two N x N or one D x D float32 matrices, 8 D factors. Peak
extra memory beyond that: two tiles of 64k floats per thread (cpp), backward one product of N D
floats where the gradient is not float32. Products are float32 (TF32 where torch is told so).

Processes: N < D, 2 N D e gathered once, one number summed forward, 2 D + 1 backward; otherwise 4 D
gathered and D^2 + D summed.
"""

from fastssl.kernels.barlow_twins.op import barlow_twins

__all__ = ["barlow_twins"]
