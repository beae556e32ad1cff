"""The public op fastssl::dino_cross_entropy: checks, backends, fake implementation, autograd."""

import torch
from torch import Tensor

from fastssl.kernels.common import dispatch
from fastssl.kernels.common import view_cross_entropy as views
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.flops import counts_no_flops
from fastssl.kernels.common.view_checks import check_terms, check_views
from fastssl.kernels.dino_cross_entropy import cuda_kernel, reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(3, 2, 8, device=device), torch.zeros(2, 2, 8, device=device)


def cannot_run_cpp(student_logits: Tensor, teacher_logits: Tensor) -> str | None:
    reason = dispatch.cannot_run_cpp(student_logits, teacher_logits)
    return reason or views.cannot_run_cpp(teacher_logits)


OP = dispatch.register(
    "dino_cross_entropy",
    {
        "triton": dispatch.cannot_run_triton,
        "cpp": cannot_run_cpp,
        "cuda": cuda_kernel.cannot_run_cuda,
    },
    _example,
)


def dino_cross_entropy(
    student_logits: Tensor,  # [S, B, K]
    teacher_logits: Tensor,  # [T, B, K]
    center: Tensor | None = None,  # [K]
    *,
    student_temp: float | Tensor,  # []
    teacher_temp: float | Tensor,  # []
    log_u: Tensor | None = None,  # [K] or [T, K]
    log_v: Tensor | None = None,  # [T, B]
    row_weights: Tensor | None = None,  # [B]
    num_rows: Tensor | None = None,  # [] int
    skip_same_view: bool = True,
    reduction: str = "mean",
    return_teacher_mean: bool = False,
    return_teacher_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Cross-entropy of every student view against every teacher view, in one pass over the logits.

    student_logits [S, B, K] and teacher_logits [T, B, K] hold S and T views of the same B images;
    view t of the teacher is view t of the student, and with skip_same_view such pairs do not count.
    The teacher's probabilities are

    - softmax((teacher - center) / teacher_temp) with a center [K] (zeros if None), as in DINO;
    - softmax(teacher / teacher_temp + log_u), or exp(teacher / teacher_temp + log_u + log_v) where
      log_v [T, B] is given too, with the logarithms of Sinkhorn's two vectors in place of a center
      (log_u [K] for one assignment over all views, [T, K] for one per view).

    reduction "mean" averages over the pairs that count and over images, weighted by row_weights [B]
    (ones if None); "sum" is the weighted sum over both. num_rows, an integer tensor without
    dimensions on the logits' device, ignores all images from that number on, whatever their logits
    hold, without a look at it from the host.

    The masked tokens of iBOT and DINOv2 are images here: student_logits and teacher_logits [1, M,
    K] of a fixed capacity M, row_weights [M], num_rows the number in use, skip_same_view=False;
    DINOv2's loss is reduction="sum" with weights divided by the number of images.

    Returns the loss, float32 (float64 for float64 logits), or a tuple of the loss and then, as
    asked for, the mean of the teacher's logits over its views and the rows in use, [K], which is
    what a center is made of, and the mean entropy of the teacher's softmax in nats, []. Several
    processes: the loss is the mean over local rows, the teacher's mean is for the caller to
    average.

    Temperatures are Python floats, which compiled code and CUDA graphs take as constants, or
    tensors without dimensions on the logits' device, whose values may change from call to call.
    Only student_logits gets a gradient. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_views("student_logits", student_logits, "teacher_logits", teacher_logits)
    terms = check_terms(
        student_logits,
        teacher_logits.shape[0],
        teacher_logits.shape[2],
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        log_u=log_u,
        log_v=log_v,
        row_weights=row_weights,
        num_rows=num_rows,
        skip_same_view=skip_same_view,
        reduction=reduction,
    )
    name = dispatch.choose_backend(OP, backend, student_logits, teacher_logits)
    if name == "reference":
        arguments = terms.arguments()
        loss = reference.dino_cross_entropy(student_logits, teacher_logits, *arguments)
        mean = entropy = loss
        if return_teacher_mean or return_teacher_entropy:
            mean, entropy = reference.teacher_statistics(teacher_logits, *arguments)
    else:
        logits = (student_logits.contiguous(), teacher_logits.detach().contiguous())
        wants_gradient = name == "cuda" and cuda_kernel.makes_gradient_in_forward(
            *logits, return_teacher_mean
        )
        if wants_gradient:
            loss, mean, entropy = cuda_kernel.with_gradient(*logits, terms, return_teacher_mean)
        else:
            loss, mean, entropy, *_ = torch.ops.fastssl.dino_cross_entropy(
                *logits, *terms.arguments(), return_teacher_mean, name
            )
    wanted = (mean,) * return_teacher_mean + (entropy,) * return_teacher_entropy
    return (loss, *wanted) if wanted else loss


@custom_op("fastssl::dino_cross_entropy")
def _dino_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    temps: Tensor | None,
    center: Tensor | None,
    log_u: Tensor | None,
    log_v: Tensor | None,
    row_weights: Tensor | None,
    num_rows: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    skip_same_view: bool,
    mean: bool,
    wants_teacher_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, teacher_mean (empty unless wanted), entropy, norm, student_stats, teacher_stats."""
    arguments = (temps, center, log_u, log_v, row_weights, num_rows, student_temp, teacher_temp)
    arguments = (*arguments, skip_same_view, mean)
    if backend == "reference":
        return _reference(student, teacher, arguments, wants_teacher_mean)
    terms = views.Terms(*arguments)
    results, sums = _first_pass(backend, student, teacher, terms, wants_teacher_mean)
    if sums is None:
        teacher_mean = student.new_empty((0,), dtype=torch.float32)
    else:
        teacher_mean = views.teacher_mean(sums, *teacher.shape[:2], num_rows)
    return (
        *(results.loss, teacher_mean, results.entropy),
        *(results.norm, results.student_stats, results.teacher_stats),
    )


def _first_pass(
    backend: str, student: Tensor, teacher: Tensor, terms: views.Terms, wants_sums: bool
) -> tuple[views.Results, Tensor | None]:
    """The results, and the sums [slices, K] of the teacher's logits where wanted."""
    num_teacher, _, num_prototypes = teacher.shape
    chunks = views.num_chunks(backend, student, num_teacher)
    parts = views.empty_parts(student, num_teacher, chunks)
    sums = None
    if wants_sums:
        slices = views.num_slices(backend, student, chunks)
        sums = student.new_empty((slices, num_prototypes), dtype=torch.float32)
    views.fill_parts(backend, student, teacher, terms, 0, parts, sums)
    results = views.empty_results(student, num_teacher)
    views.combine(backend, parts, terms, results)
    return results, sums


def _reference(student, teacher, arguments, wants_teacher_mean):
    loss = reference.dino_cross_entropy(student, teacher, *arguments)
    mean, entropy = reference.teacher_statistics(teacher, *arguments)
    if not wants_teacher_mean:
        mean = mean.new_empty((0,))
    unused = views.empty_results(student, teacher.shape[0])
    unused = (unused.norm, unused.student_stats, unused.teacher_stats)
    return loss.float(), mean.float(), entropy.float(), *(value.zero_() for value in unused)


@_dino_cross_entropy.register_fake
def _dino_cross_entropy_fake(student, teacher, *arguments):
    wants_teacher_mean = arguments[-2]
    results = views.empty_results(student, teacher.shape[0])
    size = teacher.shape[2] if wants_teacher_mean else 0
    return (
        *(results.loss, student.new_empty((size,), dtype=torch.float32), results.entropy),
        *(results.norm, results.student_stats, results.teacher_stats),
    )


@custom_op("fastssl::dino_cross_entropy_backward")
def _dino_cross_entropy_backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    temps: Tensor | None,
    center: Tensor | None,
    log_u: Tensor | None,
    row_weights: Tensor | None,
    num_rows: Tensor | None,
    norm: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_temp: float,
    teacher_temp: float,
    skip_same_view: bool,
    backend: str,
) -> Tensor:
    terms = views.Terms(
        *(temps, center, log_u, None, row_weights, num_rows),
        *(student_temp, teacher_temp, skip_same_view, False),
    )
    dstudent = torch.empty_like(student)
    stats = (student_stats, teacher_stats, norm)
    views.gradient(backend, dloss, student, teacher, terms, *stats, dstudent)
    return dstudent


@_dino_cross_entropy_backward.register_fake
def _dino_cross_entropy_backward_fake(dloss, student, *_):
    return torch.empty_like(student)


def _setup_context(ctx, inputs, output):
    *tensors, student_temp, teacher_temp, skip_same_view, mean, _, backend = inputs
    settings = (student_temp, teacher_temp, skip_same_view, mean, backend)
    ctx.settings = settings
    ctx.mark_non_differentiable(*output[1:])
    # Autograd would fill the others' gradients with zeros, K of them for a mean.
    ctx.set_materialize_grads(False)
    if backend == "reference":
        ctx.save_for_backward(*tensors)
    else:
        student, teacher, temps, center, log_u, _, row_weights, num_rows = tensors
        tensors = (student, teacher, temps, center, log_u, row_weights, num_rows)
        ctx.save_for_backward(*tensors, *output[3:])


def _backward(ctx, dloss, *_):
    student_temp, teacher_temp, skip_same_view, mean, backend = ctx.settings
    if backend == "reference":
        inputs = (*ctx.saved_tensors, student_temp, teacher_temp, skip_same_view, mean)
        dstudent, *_ = reference_gradients(ctx, reference.dino_cross_entropy, inputs, dloss)
    else:
        dstudent = torch.ops.fastssl.dino_cross_entropy_backward(
            dloss, *ctx.saved_tensors, student_temp, teacher_temp, skip_same_view, backend
        )
    return dstudent, *(None,) * 13


_dino_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
counts_no_flops(torch.ops.fastssl.dino_cross_entropy, torch.ops.fastssl.dino_cross_entropy_backward)
