"""Sinkhorn-Knopp: the matrix, and its two vectors on their way through the loss.

B samples, K prototypes: SwAV's and DINOv2's sizes, three iterations. Eager is the published form,
which works in place on one float32 matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, forward_backward, forward_only
from fastssl import functional as F

SIZES = ((2048, 4096), (512, 65536))
QUICK_SIZES = ((64, 96), (32, 1024))
ITERATIONS = 3
TEMPERATURE, STUDENT_TEMP = 0.05, 0.1
# Of the logits: cosines of features of 256 dimensions, with a few that agree.
SPREAD = 0.2


def cases(quick: bool) -> list[Case]:
    made = []
    for batch, prototypes in QUICK_SIZES if quick else SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            made.append(sinkhorn_knopp(batch, prototypes, dtype))
            made.append(sinkhorn_cross_entropy(batch, prototypes, dtype))
    return made


def published_form(logits: Tensor) -> Tensor:
    """As in SwAV and DINOv2, on the exponentials as they are."""
    q = (logits.float() / TEMPERATURE).exp().t()
    num_prototypes, batch = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True)
        q /= num_prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= batch
    q *= batch
    return q.t()


def _case(
    name: str,
    size: tuple[int, int],
    dtype: torch.dtype,
    direction: str,
    make_inputs: Callable[[torch.device], tuple],
    functions: tuple[Callable, Callable],  # eager, ours
    bytes_moved: int,
) -> Case:
    wrap = forward_only if direction == FORWARD else forward_backward
    eager, ours = functions

    def contenders(device: torch.device) -> dict[str, Callable]:
        return {
            "eager": wrap(eager),
            "compiled": wrap(torch.compile(eager)),
            "fastssl": wrap(ours),
        }

    batch, prototypes = size
    dtype_name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"{name}/{batch}x{prototypes}/{dtype_name}",
        shape=f"B={batch} K={prototypes} iterations={ITERATIONS}",
        dtype=dtype_name,
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios={base: (base, "fastssl") for base in ("eager", "compiled")},
        tolerance=1e-4 if dtype == torch.float32 or direction == FORWARD else 2e-2,
        bytes_moved=bytes_moved,
        op="sinkhorn_knopp",
    )


def sinkhorn_knopp(batch: int, prototypes: int, dtype: torch.dtype) -> Case:
    """The assignment as a matrix: one read per iteration and one more, one write."""

    def make_inputs(device: torch.device) -> tuple:
        return ((torch.randn(batch, prototypes, device=device) * SPREAD).to(dtype),)

    def ours(logits: Tensor) -> Tensor:
        return F.sinkhorn_knopp(logits, temperature=TEMPERATURE, num_iters=ITERATIONS)

    return _case(
        *("sinkhorn_knopp", (batch, prototypes), dtype, FORWARD, make_inputs),
        functions=(published_form, ours),
        bytes_moved=batch * prototypes * ((ITERATIONS + 1) * dtype.itemsize + 4),
    )


def sinkhorn_cross_entropy(batch: int, prototypes: int, dtype: torch.dtype) -> Case:
    """The assignment as the target of a cross-entropy, for which two vectors are enough."""

    def make_inputs(device: torch.device) -> tuple:
        student, teacher = torch.randn(2, batch, prototypes, device=device) * SPREAD
        student = student.to(dtype).requires_grad_()
        return student, teacher.to(dtype), torch.ones((), device=device)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        targets = published_form(teacher)
        return -(targets * (student.float() / STUDENT_TEMP).log_softmax(dim=1)).sum(dim=1).mean()

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        log_u, log_v = F.sinkhorn_knopp(
            teacher, temperature=TEMPERATURE, num_iters=ITERATIONS, materialize=False
        )
        return F.dino_cross_entropy(
            student[None],
            teacher[None],
            student_temp=STUDENT_TEMP,
            teacher_temp=TEMPERATURE,
            log_u=log_u,
            log_v=log_v,
            skip_same_view=False,
        )

    # Beside Sinkhorn's reads both matrices twice, and the gradient.
    reads = (ITERATIONS + 1) + 2 * 2 + 1
    return _case(
        *("sinkhorn_cross_entropy", (batch, prototypes), dtype, FORWARD_BACKWARD, make_inputs),
        functions=(eager, ours),
        bytes_moved=batch * prototypes * dtype.itemsize * reads,
    )
