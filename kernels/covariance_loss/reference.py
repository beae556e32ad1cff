"""The specification of covariance_loss, in eager PyTorch."""

from fastssl.kernels.common.gram_reference import covariance_loss

__all__ = ["covariance_loss"]
