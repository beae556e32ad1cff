"""linear_dino_cross_entropy in CUDA C++: the kernels of common/cuda_view_cross_entropy.py on blocks
of logits, and those of csrc/cuda/linear_dino_cross_entropy.cu on the prototypes. The products are
torch's."""

import torch
from torch import Tensor

from fastssl.kernels.common import cuda_view_cross_entropy as kernels
from fastssl.kernels.common import dispatch


def cannot_run_cuda(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
) -> str | None:
    tensors = (student_features, student_prototypes, teacher_features, teacher_prototypes)
    # What autocast may make of the products is narrower and fits all the more.
    itemsize = torch.promote_types(student_features.dtype, student_prototypes.dtype).itemsize
    return dispatch.cannot_run_cuda(*tensors) or kernels.cannot_run(
        student_features.shape[0], teacher_features.shape[0], itemsize
    )
