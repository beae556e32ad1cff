"""The specification of barlow_twins, in eager PyTorch."""

from fastssl.kernels.common.gram_reference import barlow_twins

__all__ = ["barlow_twins"]
