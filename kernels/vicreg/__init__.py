"""VICReg (Bardes et al. 2022, arXiv 2105.04906).

With N samples (of all processes), D features, x = z - mean and C = x^T x / (N - 1) per view::

    loss = sim_coeff * mean (z0 - z1)^2
         + sum over views: std_coeff / (2 D) * sum_j max(0, 1 - sqrt(C_jj + eps))
                         + cov_coeff / D * sum_{i != j} C_ij^2
    sum_ij C_ij^2 = |x x^T|^2 / (N - 1)^2                                # [N, N]

For N < D the last line stands in for C, and its gradient is x x^T x: no D x D matrix exists.
Otherwise C is one D x D matrix per view, stored with diagonal 0. Means, variances, x and the
invariance term come from one read of the features. common/gram.py has the steps.

FLOPs of the products: N < D 4 N^2 D forward (less by the symmetry), 4 N^2 D backward; otherwise
4 N D^2 each. Bytes, memory and what travels between processes are those of barlow_twins, with a
D x D matrix per view and a single number in backward.
"""

from fastssl.kernels.vicreg.op import vicreg

__all__ = ["vicreg"]
