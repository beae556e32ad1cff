"""The specification of vicreg, in eager PyTorch."""

from fastssl.kernels.common.gram_reference import vicreg

__all__ = ["vicreg"]
