"""Covariance term of VICReg (Bardes et al. 2022, arXiv 2105.04906).

With N samples (of all processes), D features, x = z - mean and C = x^T x / (N - 1)::

    loss = 1 / D * sum_{i != j} C_ij^2

vicreg's steps on one view: N x N for N < D, else D x D. Bytes, with e per feature: forward reads
N D e and writes x, 4 N D; backward reads x and the product, 12 N D, and writes N D e. Saved for
backward: x, one N x N or D x D float32 matrix, 4 D factors. Processes: N < D, N D e gathered once;
otherwise 2 D gathered and D^2 summed; one number forward or backward.
"""

from fastssl.kernels.covariance_loss.op import covariance_loss

__all__ = ["covariance_loss"]
