"""dino_cross_entropy in CUDA C++: sizes and calls of csrc/cuda/dino_cross_entropy.cu.

Two ways. In two passes as the other backends, blocks of W prototypes each. Or, from sm_90 on and in
eager mode, `with_gradient`: a cluster of blocks holds an image's logits, so that the gradient comes
out of the same reading: (2S + T)BKe bytes for forward and backward instead of (3S + 2T)BKe. It is
that of dloss = 1, and is held until backward, where another dloss costs one more reading and
writing of it. float16 takes two passes always, since gradients for dloss = 1 underflow there.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels.common import dispatch, libraries
from fastssl.kernels.common import view_cross_entropy as views

WARPS = 8
# A block's columns in two passes, the largest that fits.
CELL_WIDTHS = (2048, 1024, 512, 256)
# Shared memory of a block that lets two of them run on a processor of any architecture.
CELL_BYTES = 48 << 10
# More than this only sm_80, sm_90 and sm_100 have for one block.
MAX_CELL_BYTES = 96 << 10
CLUSTER_SIZES = (1, 2, 4, 8, 16)
# Blocks that run on one processor at the most.
BLOCKS_PER_PROCESSOR = 2
# A slice need not be cut further to give every processor work.
SMALL_SLICE = 1024
# What the driver keeps of each block's shared memory.
RESERVED_BYTES = 1 << 10


@dataclass(frozen=True)
class Device:
    processors: int
    clusters: bool
    bytes_per_processor: int
    bytes_per_block: int


@functools.cache
def device_facts(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    return Device(
        facts.multi_processor_count,
        # Those of sm_120 are smaller than what the plan counts on.
        facts.major in (9, 10),
        facts.shared_memory_per_multiprocessor,
        facts.shared_memory_per_block_optin,
    )


def shared_bytes(
    num_student: int, num_teacher: int, itemsize: int, width: int, wants_sums: bool, cluster: int
) -> int:
    """Shared memory of a block that holds `width` prototypes: Memory in view_cross_entropy.cuh.

    cluster is 0 in two passes.
    """
    rows = 2 * num_student + 3 * num_teacher + num_student * num_teacher
    counts = (
        4 * num_teacher * width,
        itemsize * num_student * width,
        4 * width * wants_sums,
        8 * (num_student + 2 * num_teacher + WARPS),
        4 * rows * WARPS,
        4 * rows,
        4 * rows * cluster,
        8 * num_student * (cluster > 0),
        8 * num_teacher * (cluster > 0),
    )
    return sum(-(-count // 16) * 16 for count in counts)


def cell_width(num_student: int, num_teacher: int, itemsize: int) -> int | None:
    """Prototypes of a block in two passes; None if no width fits."""
    sizes = (num_student, num_teacher, itemsize)
    fitting = [w for w in CELL_WIDTHS if shared_bytes(*sizes, w, True, 0) <= CELL_BYTES]
    if fitting:
        return fitting[0]
    last = CELL_WIDTHS[-1]
    return last if shared_bytes(*sizes, last, True, 0) <= MAX_CELL_BYTES else None


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
    halves = device.bytes_per_processor // BLOCKS_PER_PROCESSOR - RESERVED_BYTES
    for limit in (min(halves, device.bytes_per_block), device.bytes_per_block):
        found = None
        for cluster in CLUSTER_SIZES:
            width = -(-num_prototypes // (8 * cluster)) * 8
            size = shared_bytes(num_student, num_teacher, itemsize, width, wants_sums, cluster)
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
    if cell_width(student.shape[0], teacher.shape[0], student.dtype.itemsize) is None:
        return f"{student.shape[0]} x {teacher.shape[0]} views do not fit into shared memory"
    return None


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


def _loaded() -> None:
    reason = libraries.why_no_cuda_library()
    if reason is not None:
        raise RuntimeError(f"dino_cross_entropy: {reason}")


def forward(
    student: Tensor, teacher: Tensor, terms: views.Terms, wants_sums: bool
) -> tuple[views.Results, Tensor | None]:
    """The results of the first pass, and the sums [slices, K] of the teacher's logits."""
    _loaded()
    num_student, batch, num_prototypes = student.shape
    num_teacher = teacher.shape[0]
    width = cell_width(num_student, num_teacher, student.dtype.itemsize)
    cells = -(-num_prototypes // width)
    parts = views.empty_parts(student, num_teacher, cells)
    slices, sums = max(1, batch), None
    if wants_sums:
        blocks = BLOCKS_PER_PROCESSOR * device_facts(student.device).processors
        slices = max(1, min(batch, blocks // cells))
        sums = student.new_empty((slices, num_prototypes), dtype=torch.float32)
    torch.ops.fastssl_cuda.dino_cross_entropy_parts(
        *(student, teacher, terms.student_temp, terms.teacher_temp, terms.temps, terms.center),
        *(terms.log_u, terms.num_rows, width, slices, parts, sums),
    )
    results = views.empty_results(student, num_teacher)
    torch.ops.fastssl_cuda.dino_cross_entropy_combine(
        *(parts, terms.log_v, terms.row_weights, terms.num_rows, terms.skip_same_view, terms.mean),
        *(parts.new_empty((batch, 2)), results.student_stats, results.teacher_stats),
        *(results.loss, results.entropy, results.norm),
    )
    return results, sums


def gradient(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    terms: views.Terms,
    student_stats: Tensor,
    teacher_stats: Tensor,
    norm: Tensor,
    dstudent: Tensor,
) -> None:
    _loaded()
    width = cell_width(student.shape[0], teacher.shape[0], student.dtype.itemsize)
    torch.ops.fastssl_cuda.dino_cross_entropy_gradient(
        *(dloss, student, teacher, terms.student_temp, terms.teacher_temp, terms.temps),
        *(terms.center, terms.log_u, terms.num_rows, terms.row_weights, terms.skip_same_view),
        *(width, student_stats, teacher_stats, norm, dstudent),
    )


def _forward_with_gradient(
    student: Tensor, teacher: Tensor, terms: views.Terms, wants_sums: bool
) -> tuple[views.Results, Tensor | None, Tensor]:
    _loaded()
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
            gradient(dloss, student, teacher, ctx.terms, *statistics, dstudent)
        else:
            torch.ops.fastssl_cuda.scale(dstudent, dloss)
        return dstudent, None, None, None


def with_gradient(
    student: Tensor, teacher: Tensor, terms: views.Terms, wants_teacher_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, teacher_mean (empty unless wanted) and entropy; the gradient is made with them."""
    return _WithGradient.apply(student, teacher, terms, wants_teacher_mean)
