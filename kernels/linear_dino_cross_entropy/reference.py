"""The specification of linear_dino_cross_entropy, in eager PyTorch: the logits, then their loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.common import view_reference

SMALLEST_NORM = 1e-12
# Where num_rows stands among the arguments of dino_cross_entropy after the logits.
NUM_ROWS = 5


def prototype_logits(
    features: Tensor,  # [V, B, D]
    prototypes: Tensor,  # [K, D]
    normalize_prototypes: bool,
    dtype: torch.dtype,  # of the product
) -> Tensor:  # [V, B, K]
    logits = F.linear(features.to(dtype), prototypes.to(dtype))
    if not normalize_prototypes:
        return logits
    wide = prototypes.to(torch.promote_types(prototypes.dtype, torch.float32))
    return logits / wide.norm(dim=1).clamp(min=SMALLEST_NORM)


def linear_dino_cross_entropy(
    student_features: Tensor,  # [S, B, D]
    student_prototypes: Tensor,  # [K, D]
    teacher_features: Tensor,  # [T, B, E]
    teacher_prototypes: Tensor,  # [K, E]
    normalize_prototypes: bool,
    dtype: torch.dtype,
    *arguments: object,  # those of dino_cross_entropy after the logits
) -> Tensor:  # []
    num_rows = arguments[NUM_ROWS]
    student_features = view_reference.rows_in_use(student_features, num_rows)
    teacher_features = view_reference.rows_in_use(teacher_features.detach(), num_rows)
    teacher_prototypes = teacher_prototypes.detach()
    return view_reference.dino_cross_entropy(
        prototype_logits(student_features, student_prototypes, normalize_prototypes, dtype),
        prototype_logits(teacher_features, teacher_prototypes, normalize_prototypes, dtype),
        *arguments,
    )


def teacher_statistics(
    teacher_features: Tensor,  # [T, B, E]
    teacher_prototypes: Tensor,  # [K, E]
    normalize_prototypes: bool,
    dtype: torch.dtype,
    *arguments: object,
) -> tuple[Tensor, Tensor]:  # mean of the logits [K], mean entropy of their softmax in nats []
    features = view_reference.rows_in_use(teacher_features.detach(), arguments[NUM_ROWS])
    logits = prototype_logits(features, teacher_prototypes.detach(), normalize_prototypes, dtype)
    return view_reference.teacher_statistics(logits, *arguments)
