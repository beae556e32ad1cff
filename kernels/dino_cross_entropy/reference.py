"""The specification of dino_cross_entropy, in eager PyTorch: see common/view_reference.py."""

from fastssl.kernels.common.view_reference import dino_cross_entropy, teacher_statistics

__all__ = ["dino_cross_entropy", "teacher_statistics"]
