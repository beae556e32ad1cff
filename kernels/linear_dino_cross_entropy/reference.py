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
    lengths: Tensor | None,  # [K]
    normalize_prototypes: bool,
    dtype: torch.dtype,  # of the product
) -> Tensor:  # [V, B, K]
    logits = F.linear(features.to(dtype), prototypes.to(dtype))
    if not normalize_prototypes:
        return logits
    wide = prototypes.to(torch.promote_types(prototypes.dtype, torch.float32))
    logits = logits / wide.norm(dim=1).clamp(min=SMALLEST_NORM)
    return logits if lengths is None else logits * lengths


def linear_dino_cross_entropy(
    student_features: Tensor,  # [S, B, D]
    student_prototypes: Tensor,  # [K, D]
    teacher_features: Tensor,  # [T, B, E]
    teacher_prototypes: Tensor,  # [K, E]
    student_lengths: Tensor | None,  # [K]
    teacher_lengths: Tensor | None,  # [K]
    normalize_prototypes: bool,
    dtype: torch.dtype,
    *arguments: object,  # those of dino_cross_entropy after the logits
) -> Tensor:  # []
    num_rows = arguments[NUM_ROWS]
    student_features = view_reference.rows_in_use(student_features, num_rows)
    teacher_features = view_reference.rows_in_use(teacher_features.detach(), num_rows)
    student = (student_features, student_prototypes, student_lengths)
    teacher = (teacher_features, teacher_prototypes.detach(), teacher_lengths)
    return view_reference.dino_cross_entropy(
        prototype_logits(*student, normalize_prototypes, dtype),
        prototype_logits(*teacher, normalize_prototypes, dtype).detach(),
        *arguments,
    )


def teacher_statistics(
    teacher_features: Tensor,  # [T, B, E]
    teacher_prototypes: Tensor,  # [K, E]
    teacher_lengths: Tensor | None,  # [K]
    normalize_prototypes: bool,
    dtype: torch.dtype,
    *arguments: object,
) -> tuple[Tensor, Tensor]:  # mean of the logits [K], mean entropy of their softmax in nats []
    features = view_reference.rows_in_use(teacher_features.detach(), arguments[NUM_ROWS])
    teacher = (features, teacher_prototypes.detach(), teacher_lengths)
    logits = prototype_logits(*teacher, normalize_prototypes, dtype).detach()
    return view_reference.teacher_statistics(logits, *arguments)
