"""dino_cross_entropy in CUDA C++: sizes and calls of csrc/cuda/dino_cross_entropy.cu.

Two ways. In two passes as the other backends, blocks of W prototypes each. Or, from sm_90 on and in
eager mode, `with_gradient`: a cluster of blocks holds an image's logits, so that the gradient comes
out of the same reading: (2S + T)BKe bytes for forward and backward instead of (3S + 2T)BKe. It is
that of dloss = 1, and is held until backward, where another dloss costs one more reading and
writing of it. float16 takes two passes always, since gradients for dloss = 1 underflow there.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels.common import cuda_view_cross_entropy as kernels
from fastssl.kernels.common import dispatch
from fastssl.kernels.common import view_cross_entropy as views
from fastssl.kernels.common.cuda_device import (
    BLOCKS_PER_PROCESSOR,
    CLUSTER_SIZES,
    Device,
    device_facts,
)

# A slice need not be cut further to give every processor work.
SMALL_SLICE = 1024


def cluster_plan(
    num_student: int,
    num_teacher: int,
    batch: int,
    num_prototypes: int,
    itemsize: int,
    wants_sums: bool,
    device: Device,
) -> tuple[int, int] | None:
    """(blocks of a cluster, prototypes of a block), None where an image fits into no cluster.

    The smallest cluster of which two blocks run on a processor and which leaves none without work,
    else the largest; then one block per processor.
    """
    if not device.clusters:
        return None
    for limit in (device.bytes_for_two, device.bytes_per_block):
        found = None
        for cluster in CLUSTER_SIZES:
            width = -(-num_prototypes // (8 * cluster)) * 8
            size = kernels.shared_bytes(
                num_student, num_teacher, itemsize, width, wants_sums, cluster
            )
            if size > limit:
                continue
            found = (cluster, width)
            if batch * cluster >= device.processors or width <= SMALL_SLICE:
                break
        if found is not None:
            return found
    return None


def cannot_run_cuda(student: Tensor, teacher: Tensor) -> str | None:
    reason = dispatch.cannot_run_cuda(student, teacher)
    if reason is not None:
        return reason
    if student.dtype != teacher.dtype:
        return f"logits have two dtypes, {student.dtype} and {teacher.dtype}"
    return kernels.cannot_run(student.shape[0], teacher.shape[0], student.itemsize)


def _plan_for(student: Tensor, teacher: Tensor, wants_sums: bool) -> tuple[int, int] | None:
    num_student, batch, num_prototypes = student.shape
    sizes = (num_student, teacher.shape[0], batch, num_prototypes, student.dtype.itemsize)
    return cluster_plan(*sizes, wants_sums, device_facts(student.device))


def makes_gradient_in_forward(student: Tensor, teacher: Tensor, wants_sums: bool) -> bool:
    """Whether this call takes `with_gradient`. Compiled code does not: the buffer that backward
    hands on would be an alias of what forward returned."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and student.requires_grad):
        return False
    if student.dtype == torch.float16 or student.numel() == 0:
        return False
    return _plan_for(student, teacher, wants_sums) is not None


def _forward_with_gradient(
    student: Tensor, teacher: Tensor, terms: views.Terms, wants_sums: bool
) -> tuple[views.Results, Tensor | None, Tensor]:
    cluster, width = _plan_for(student, teacher, wants_sums)
    batch, num_prototypes = student.shape[1:]
    running = BLOCKS_PER_PROCESSOR * device_facts(student.device).processors // cluster
    slices = max(1, min(batch, running))
    sums = None
    if wants_sums:
        sums = student.new_empty((slices, num_prototypes), dtype=torch.float32)
    results = views.empty_results(student, teacher.shape[0])
    dstudent = torch.empty_like(student)
    torch.ops.fastssl_cuda.dino_cross_entropy_fused(
        *(student, teacher, terms.student_temp, terms.teacher_temp, terms.temps, terms.center),
        *(terms.log_u, terms.log_v, terms.num_rows, terms.row_weights, terms.skip_same_view),
        *(terms.mean, width, cluster, slices),
        results.norm.new_empty((batch, 2)),
        *(results.student_stats, results.teacher_stats, results.loss, results.entropy),
        *(results.norm, dstudent, sums),
    )
    return results, sums, dstudent


class _WithGradient(torch.autograd.Function):
    """The gradient made in forward is handed over by the first backward; a second one, with
    retain_graph, makes it anew from the logits."""

    @staticmethod
    def forward(ctx, student, teacher, terms, wants_teacher_mean):
        num_teacher, batch, _ = teacher.shape
        results, sums, ctx.dstudent = _forward_with_gradient(
            student, teacher, terms, wants_teacher_mean
        )
        mean = results.loss.new_empty((0,))
        if sums is not None:
            mean = views.teacher_mean(sums, num_teacher, batch, terms.num_rows)
        ctx.terms = terms
        ctx.save_for_backward(
            student, teacher, results.student_stats, results.teacher_stats, results.norm
        )
        ctx.mark_non_differentiable(mean, results.entropy)
        ctx.set_materialize_grads(False)
        return results.loss, mean, results.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return None, None, None, None
        dstudent, ctx.dstudent = ctx.dstudent, None
        if dstudent is None:
            student, teacher, *statistics = ctx.saved_tensors
            dstudent = torch.empty_like(student)
            views.gradient("cuda", dloss, student, teacher, ctx.terms, *statistics, dstudent)
        else:
            torch.ops.fastssl_cuda.scale(dstudent, dloss)
        return dstudent, None, None, None


def with_gradient(
    student: Tensor, teacher: Tensor, terms: views.Terms, wants_teacher_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, teacher_mean (empty unless wanted) and entropy; the gradient is made with them."""
    return _WithGradient.apply(student, teacher, terms, wants_teacher_mean)
