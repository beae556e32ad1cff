"""Sinkhorn-Knopp assignment of samples to prototypes (SwAV, Caron et al. 2020, arXiv 2006.09882).

With B samples (of all processes), K prototypes and E = exp(logits / temperature)::

    v[b] = 1
    num_iters times:
        u[k] = 1 / sum_b E[b, k] v[b]            # prototypes first
        v[b] = 1 / sum_k E[b, k] u[k]
    assignment[b, k] = E[b, k] u[k] v[b]         # rows sum to 1

The factors 1 / sum(E), 1 / K and 1 / B of the published codes cancel. Only u and v are kept.

Why nothing under- or overflows. The first sums are taken next to each prototype's largest logit,
which cancels exactly (a shift per sample, as often proposed against the overflow, does not:
prototypes are summed first). From then on p[b, k] = E u v is a row's softmax, and the next u is
u[k] / sum_b p[b, k]. With the columns of E u v_old equal to 1, no row of it is above K, hence no
column of p is below 1 / K: sums of plain exponentials serve, and terms below 2^-100 may count as
0. In the same way a row's sum stays within a factor of max(B, K) of the iteration before, which
serves as its shift; where that fails, as it may in the first iteration, the row's maximum is
searched.

Bytes, with e per logit: num_iters + 1 reads of B K e, one for the first prototype sums and then
one for rows and columns together (Triton, and CUDA C++ where no cluster of blocks holds whole rows:
two, 2 num_iters in all), and 4 B K written if the matrix is wanted. Across processes: num_iters + 1
vectors of K numbers. The order of every sum is fixed by B, K and the GPU.

Not differentiable. Peak extra memory on a CPU: partial column sums, K floats or a sixteenth of the
logits in float32, 64 K floats at most; exponentials of up to four rows per thread (half a MB, or
one row); a few vectors of K. On a GPU: 2 K floats per slice of the rows, which are as many as give
every processor four programs of 256 prototypes; 2 B floats. With backend="cuda" K floats per
cluster that runs at once, and in the first pass 2 K per slice of 32 rows or more.
"""

from fastssl.kernels.sinkhorn_knopp.op import sinkhorn_knopp

__all__ = ["sinkhorn_knopp"]
