"""Argument checks of the losses over pairs of views, and their canonical form."""

import torch
from torch import Tensor

from fastssl.kernels.common.checks import INDEX_DTYPES, check_tensor
from fastssl.kernels.common.view_cross_entropy import Terms

REDUCTIONS = ("mean", "sum")


def check_views(
    student_name: str,
    student: Tensor,
    teacher_name: str,
    teacher: Tensor,
    same_width: bool = True,
) -> None:
    """Both [views, B, width], at least one view each and width at least 1."""
    check_tensor(student_name, student, dim=3)
    check_tensor(teacher_name, teacher, dim=3, device=student.device)
    for name, value in ((student_name, student), (teacher_name, teacher)):
        if value.shape[0] < 1 or value.shape[2] < 1:
            raise ValueError(
                f"{name} must have at least one view and one column, got {list(value.shape)}"
            )
    width = student.shape[2] if same_width else teacher.shape[2]
    if tuple(teacher.shape[1:]) != (student.shape[1], width):
        raise ValueError(
            f"{teacher_name} must have shape [T, {student.shape[1]}, {width}] beside "
            f"{student_name} {list(student.shape)}, got {list(teacher.shape)}"
        )


def _vector(name: str, value: Tensor, size: int, legend: str, like: Tensor) -> Tensor:
    """`value` as [size] without gradient; leading dimensions of 1 are allowed."""
    check_tensor(name, value, device=like.device)
    if value.numel() != size or value.shape[-1:] != (size,):
        raise ValueError(
            f"{name} must have shape [{legend}] = [{size}] after leading ones, "
            f"got {list(value.shape)}"
        )
    return _canonical(value.reshape(size), like)


def _canonical(value: Tensor, like: Tensor) -> Tensor:
    """Contiguous, without gradient, float32 or float64 as the logits are."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return value.detach().to(dtype).contiguous()


def _check_temperature(name: str, value: float | Tensor, device: torch.device) -> None:
    if isinstance(value, Tensor):
        check_tensor(name, value, dim=0, device=device)
    elif not isinstance(value, (float, int, torch.SymFloat)):
        raise TypeError(f"{name} must be a float or a Tensor, got {type(value).__name__}")
    elif not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _temperatures(
    student_temp: float | Tensor, teacher_temp: float | Tensor, like: Tensor
) -> tuple[float, float, Tensor | None]:
    """Two floats, or two floats that count for nothing and a tensor [2] that does."""
    temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    for name, value in temps.items():
        _check_temperature(name, value, like.device)
    if not any(isinstance(value, Tensor) for value in temps.values()):
        return float(student_temp), float(teacher_temp), None
    pair = [
        value if isinstance(value, Tensor) else torch.full((), value, device=like.device)
        for value in temps.values()
    ]
    return 1.0, 1.0, torch.stack([_canonical(value, like) for value in pair])


def check_terms(
    student: Tensor,  # [S, B, ...]
    num_teacher: int,
    num_prototypes: int,
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    center: Tensor | None,
    log_u: Tensor | None,
    log_v: Tensor | None,
    row_weights: Tensor | None,
    num_rows: Tensor | None,
    skip_same_view: bool,
    reduction: str,
) -> Terms:
    """Checks everything but the logits; small operands come out in the dtype of statistics."""
    num_student, batch = student.shape[:2]
    device = student.device
    if center is not None and log_u is not None:
        raise ValueError("log_u takes the place of center, got both")
    if log_v is not None and log_u is None:
        raise ValueError("log_v needs log_u, got log_v alone")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if skip_same_view and num_student == num_teacher == 1:
        raise ValueError(
            "skip_same_view must be False for one student and one teacher view, "
            "which leave no other pair"
        )
    if center is not None:
        center = _vector("center", center, num_prototypes, "K", student)
    if log_u is not None:
        check_tensor("log_u", log_u, dim=(1, 2), device=device)
        rows = 1 if log_u.dim() == 1 else log_u.shape[0]
        if log_u.shape[-1] != num_prototypes or rows not in (1, num_teacher):
            raise ValueError(
                f"log_u must have shape [K] = [{num_prototypes}] or [T, K] = "
                f"[{num_teacher}, {num_prototypes}], got {list(log_u.shape)}"
            )
        log_u = _canonical(log_u.reshape(rows, num_prototypes), student)
    if log_v is not None:
        check_tensor("log_v", log_v, device=device)
        if tuple(log_v.shape) not in ((num_teacher, batch), (num_teacher * batch,)):
            raise ValueError(
                f"log_v must have shape [T, B] = [{num_teacher}, {batch}] or [T * B], "
                f"got {list(log_v.shape)}"
            )
        log_v = _canonical(log_v.reshape(num_teacher, batch), student)
    if row_weights is not None:
        row_weights = _vector("row_weights", row_weights, batch, "B", student)
    if num_rows is not None:
        check_tensor("num_rows", num_rows, dtypes=INDEX_DTYPES, device=device)
        if num_rows.numel() != 1:
            raise ValueError(f"num_rows must hold one integer, got shape {list(num_rows.shape)}")
        num_rows = num_rows.reshape(()).long()
    student_temp, teacher_temp, temps = _temperatures(student_temp, teacher_temp, student)
    return Terms(
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        temps=temps,
        center=center,
        log_u=log_u,
        log_v=log_v,
        row_weights=row_weights,
        num_rows=num_rows,
        skip_same_view=bool(skip_same_view),
        mean=reduction == "mean",
    )
