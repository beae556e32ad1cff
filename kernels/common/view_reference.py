"""The specification of the cross-entropy between teacher and student views, in eager PyTorch.

It stands here because dino_cross_entropy and linear_dino_cross_entropy are both held to it.
"""

import torch
from torch import Tensor


def counted_pairs(num_student: int, num_teacher: int, skip_same_view: bool) -> int:
    return num_student * num_teacher - skip_same_view * min(num_student, num_teacher)


def teacher_scores(
    teacher_logits: Tensor,  # [T, B, K]
    center: Tensor | None,  # [K]
    log_u: Tensor | None,  # [1, K] or [T, K]
    teacher_temp: float | Tensor,
) -> Tensor:  # [T, B, K], whose softmax is the target
    dtype = teacher_logits.dtype
    scores = teacher_logits if center is None else teacher_logits - center.to(dtype)
    scores = scores / teacher_temp
    return scores if log_u is None else scores + log_u.to(dtype).unsqueeze(1)


def rows_in_use(logits: Tensor, num_rows: Tensor | None) -> Tensor:
    """`logits` [V, B, K] with zeros from row num_rows on, where there may be anything, even NaN."""
    if num_rows is None:
        return logits
    valid = torch.arange(logits.shape[1], device=logits.device) < num_rows
    return torch.where(valid[:, None], logits, 0.0)


def dino_cross_entropy(
    student_logits: Tensor,  # [S, B, K]
    teacher_logits: Tensor,  # [T, B, K]
    temps: Tensor | None,  # [2], in place of the two numbers below
    center: Tensor | None,  # [K]
    log_u: Tensor | None,  # [1, K] or [T, K]
    log_v: Tensor | None,  # [T, B]
    row_weights: Tensor | None,  # [B]
    num_rows: Tensor | None,  # [] int
    student_temp: float,
    teacher_temp: float,
    skip_same_view: bool,
    mean: bool,
) -> Tensor:  # []
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if temps is not None:
        student_temp, teacher_temp = temps.unbind()
    student = rows_in_use(student_logits.to(dtype), num_rows)
    teacher = rows_in_use(teacher_logits.detach().to(dtype), num_rows)
    scores = teacher_scores(teacher, center, log_u, teacher_temp)
    if log_v is None:
        probabilities = scores.softmax(dim=-1)
    else:
        probabilities = (scores + log_v.to(dtype).unsqueeze(-1)).exp()
    log_probabilities = (student / student_temp).log_softmax(dim=-1)
    # [T, S, B]: one cross-entropy per pair of views and image.
    with torch.autocast(student.device.type, enabled=False):
        pairs = -torch.einsum("tbk,sbk->tsb", probabilities, log_probabilities)
    num_teacher, num_student, batch = pairs.shape
    if skip_same_view:
        same = torch.eye(num_teacher, num_student, dtype=torch.bool, device=pairs.device)
        pairs = pairs.masked_fill(same.unsqueeze(-1), 0.0)
    weights = pairs.new_ones(batch) if row_weights is None else row_weights.to(dtype)
    if num_rows is not None:
        weights = torch.where(torch.arange(batch, device=pairs.device) < num_rows, weights, 0.0)
        pairs = torch.where(weights == 0, 0.0, pairs)
    loss = (pairs * weights).sum()
    if not mean:
        return loss
    total = weights.sum() * counted_pairs(num_student, num_teacher, skip_same_view)
    return loss / torch.where(total == 0, 1.0, total)


def teacher_statistics(
    teacher_logits: Tensor,  # [T, B, K]
    *arguments: object,  # those of dino_cross_entropy after the logits
) -> tuple[Tensor, Tensor]:  # mean of the logits [K], mean entropy of their softmax in nats []
    temps, center, log_u, _, _, num_rows, _, teacher_temp, *_ = arguments
    if temps is not None:
        teacher_temp = temps[1]
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    teacher = rows_in_use(teacher_logits.detach().to(dtype), num_rows)
    num_teacher, batch = teacher.shape[:2]
    count = torch.tensor(batch, device=teacher.device) if num_rows is None else num_rows
    total = (num_teacher * count.clamp(0, batch)).clamp(min=1)
    scores = teacher_scores(teacher, center, log_u, teacher_temp)
    entropies = -(scores.softmax(dim=-1) * scores.log_softmax(dim=-1)).sum(dim=-1)  # [T, B]
    entropies = rows_in_use(entropies.unsqueeze(-1), num_rows)
    return teacher.sum(dim=(0, 1)) / total, entropies.sum() / total
