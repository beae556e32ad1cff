"""The public op fastssl::linear_dino_cross_entropy: checks, fake implementation, autograd."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import dispatch
from fastssl.kernels.common import view_cross_entropy as views
from fastssl.kernels.common.autograd import reference_gradients
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.common.view_checks import check_terms, check_views
from fastssl.kernels.linear_dino_cross_entropy import blocks, cuda_kernel, reference


def _example(device: torch.device) -> tuple:
    student = (torch.zeros(3, 2, 4, device=device), torch.zeros(8, 4, device=device))
    return *student, torch.zeros(2, 2, 4, device=device), torch.zeros(8, 4, device=device)


def cannot_run_cpp(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
) -> str | None:
    tensors = (student_features, student_prototypes, teacher_features, teacher_prototypes)
    return dispatch.cannot_run_cpp(*tensors) or views.cannot_run_cpp(teacher_features)


OP = dispatch.register(
    "linear_dino_cross_entropy",
    {
        "triton": dispatch.cannot_run_triton,
        "cpp": cannot_run_cpp,
        "cuda": cuda_kernel.cannot_run_cuda,
    },
    _example,
)


def linear_dino_cross_entropy(
    student_features: Tensor,  # [S, B, D]
    student_prototypes: Tensor,  # [K, D]
    teacher_features: Tensor,  # [T, B, E]
    teacher_prototypes: Tensor,  # [K, E]
    center: Tensor | None = None,  # [K]
    *,
    student_temp: float | Tensor,  # []
    teacher_temp: float | Tensor,  # []
    normalize_prototypes: bool = False,
    student_lengths: Tensor | None = None,  # [K]
    teacher_lengths: Tensor | None = None,  # [K]
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
    """`dino_cross_entropy` of features @ prototypes^T, without the logits ever being in memory.

    Equals dino_cross_entropy(F.linear(student_features, student_prototypes),
    F.linear(teacher_features, teacher_prototypes), center, ...), whose other arguments and results
    it shares. With normalize_prototypes every prototype counts as divided by its length (a
    weight-normalised layer with unit scale), and as having the length that student_lengths and
    teacher_lengths say where they are given (one with a learned scale); this multiplies the
    products, so no normalised copy exists. The products run in the autocast dtype where autocast is
    on. In float16 the gradients of learned lengths far below 1 lose digits.

    student_features, student_prototypes and student_lengths get gradients, prototypes through their
    own lengths too; the teacher's arguments get none. Prototypes and lengths are parameters: under
    FSDP2 call this inside the forward of the module that owns them.

    Raises ValueError or TypeError for arguments that do not fit, naming them.
    """
    _check(student_features, student_prototypes, teacher_features, teacher_prototypes)
    _check_lengths(student_lengths, teacher_lengths, student_prototypes, normalize_prototypes)
    terms = check_terms(
        student_features,
        teacher_features.shape[0],
        student_prototypes.shape[0],
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
    tensors = (
        *(student_features, student_prototypes),
        *(teacher_features.detach(), teacher_prototypes.detach()),
        *(student_lengths, None if teacher_lengths is None else teacher_lengths.detach()),
    )
    name = dispatch.choose_backend(OP, backend, *tensors[:4])
    settings = (bool(normalize_prototypes), _product_dtype(*tensors[:2]), *terms.arguments())
    if name == "reference":
        loss = reference.linear_dino_cross_entropy(*tensors, *settings)
        mean = entropy = loss
        if return_teacher_mean or return_teacher_entropy:
            mean, entropy = reference.teacher_statistics(*tensors[2:4], tensors[5], *settings)
    else:
        tensors = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        loss, mean, entropy, *_ = torch.ops.fastssl.linear_dino_cross_entropy(
            *tensors, *settings, return_teacher_mean, name
        )
    wanted = (mean,) * return_teacher_mean + (entropy,) * return_teacher_entropy
    return (loss, *wanted) if wanted else loss


def _check(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
) -> None:
    check_views("student_features", student_features, "teacher_features", teacher_features, False)
    device = student_features.device
    check_tensor("student_prototypes", student_prototypes, dim=2, device=device)
    check_tensor("teacher_prototypes", teacher_prototypes, dim=2, device=device)
    check_shape(
        "student_prototypes", student_prototypes, (None, student_features.shape[2]), "[K, D]"
    )
    if student_prototypes.shape[0] < 1:
        raise ValueError("student_prototypes must hold at least one prototype, got none")
    expected = (student_prototypes.shape[0], teacher_features.shape[2])
    check_shape("teacher_prototypes", teacher_prototypes, expected, "[K, E]")


def _check_lengths(
    student: Tensor | None, teacher: Tensor | None, prototypes: Tensor, normalize: bool
) -> None:
    given = {n: v for n, v in (("student", student), ("teacher", teacher)) if v is not None}
    if given and (len(given) < 2 or not normalize):
        raise ValueError(
            "student_lengths and teacher_lengths must be given together, with "
            f"normalize_prototypes=True, got those of {' and '.join(given)} with {bool(normalize)}"
        )
    for name, value in given.items():
        check_tensor(f"{name}_lengths", value, dim=1, device=prototypes.device)
        check_shape(f"{name}_lengths", value, (prototypes.shape[0],), "[K]")


def _product_dtype(features: Tensor, prototypes: Tensor) -> torch.dtype:
    dtype = torch.promote_types(features.dtype, prototypes.dtype)
    device_type = features.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


@custom_op("fastssl::linear_dino_cross_entropy")
def _linear_dino_cross_entropy(
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    student_lengths: Tensor | None,
    teacher_lengths: Tensor | None,
    normalize_prototypes: bool,
    dtype: torch.dtype,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, teacher_mean (empty unless wanted), entropy, norm, student_stats, teacher_stats, and
    the prototypes' inverse lengths, student's and teacher's (empty unless normalize_prototypes)."""
    tensors = (student_features, student_prototypes, teacher_features, teacher_prototypes)
    lengths = (student_lengths, teacher_lengths)
    arguments = (temps, center, log_u, log_v, row_weights, num_rows, student_temp, teacher_temp)
    arguments = (*arguments, skip_same_view, mean)
    settings = (normalize_prototypes, dtype, *arguments)
    outputs = _linear_dino_cross_entropy_fake(
        *tensors, *lengths, *settings, wants_teacher_mean, backend
    )
    loss, teacher_mean, entropy, *saved = outputs
    if backend == "reference":
        loss.copy_(reference.linear_dino_cross_entropy(*tensors, *lengths, *settings))
        statistics = reference.teacher_statistics(*tensors[2:], teacher_lengths, *settings)
        entropy.copy_(statistics[1])
        if wants_teacher_mean:
            teacher_mean.copy_(statistics[0])
        for value in saved:
            value.zero_()
        return outputs
    norm, student_stats, teacher_stats, *scales = saved
    blocks.forward(
        backend,
        tensors,
        views.Terms(*arguments),
        dtype,
        scales if normalize_prototypes else None,
        None if student_lengths is None else lengths,
        views.Results(loss, entropy, norm, student_stats, teacher_stats),
        teacher_mean if wants_teacher_mean else None,
    )
    return outputs


@_linear_dino_cross_entropy.register_fake
def _linear_dino_cross_entropy_fake(
    student_features,
    student_prototypes,
    teacher_features,
    teacher_prototypes,
    student_lengths,
    teacher_lengths,
    normalize_prototypes,
    *arguments,
):
    wants_teacher_mean = arguments[-2]
    results = views.empty_results(student_features, teacher_features.shape[0])
    num_prototypes = student_prototypes.shape[0]
    wanted = (wants_teacher_mean, normalize_prototypes, normalize_prototypes)
    teacher_mean, *scales = (
        student_features.new_empty((num_prototypes if want else 0,), dtype=torch.float32)
        for want in wanted
    )
    return (
        *(results.loss, teacher_mean, results.entropy),
        *(results.norm, results.student_stats, results.teacher_stats, *scales),
    )


@custom_op("fastssl::linear_dino_cross_entropy_backward")
def _linear_dino_cross_entropy_backward(
    dloss: Tensor,
    student_features: Tensor,
    student_prototypes: Tensor,
    teacher_features: Tensor,
    teacher_prototypes: Tensor,
    student_lengths: Tensor | None,
    teacher_lengths: Tensor | None,
    normalize_prototypes: bool,
    dtype: torch.dtype,
    temps: Tensor | None,
    center: Tensor | None,
    log_u: Tensor | None,
    row_weights: Tensor | None,
    num_rows: Tensor | None,
    norm: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    student_temp: float,
    teacher_temp: float,
    skip_same_view: bool,
    wants_dfeatures: bool,
    wants_dprototypes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dstudent_features, dstudent_prototypes and with these dstudent_lengths; those not wanted are
    empty."""
    tensors = (student_features, student_prototypes, teacher_features, teacher_prototypes)
    wants_dlengths = wants_dprototypes and student_lengths is not None
    grads = _gradients_like(
        student_features, student_prototypes, student_lengths, wants_dfeatures, wants_dprototypes
    )
    terms = views.Terms(
        *(temps, center, log_u, None, row_weights, num_rows),
        *(student_temp, teacher_temp, skip_same_view, False),
    )
    blocks.backward(
        backend,
        dloss,
        tensors,
        terms,
        dtype,
        (student_scale, teacher_scale) if normalize_prototypes else None,
        None if student_lengths is None else (student_lengths, teacher_lengths),
        (student_stats, teacher_stats, norm),
        grads[0] if wants_dfeatures else None,
        grads[1] if wants_dprototypes else None,
        grads[2] if wants_dlengths else None,
    )
    return grads


def _gradients_like(features, prototypes, lengths, wants_dfeatures, wants_dprototypes):
    number = prototypes.shape[0] if wants_dprototypes and lengths is not None else 0
    return (
        torch.empty_like(features) if wants_dfeatures else features.new_empty((0,)),
        torch.empty_like(prototypes) if wants_dprototypes else prototypes.new_empty((0,)),
        prototypes.new_empty((number,), dtype=torch.float32),
    )


@_linear_dino_cross_entropy_backward.register_fake
def _linear_dino_cross_entropy_backward_fake(
    dloss, features, prototypes, teacher_features, teacher_prototypes, lengths, *arguments
):
    return _gradients_like(features, prototypes, lengths, *arguments[-3:-1])


def _setup_context(ctx, inputs, output):
    operands, settings, rest = inputs[:6], inputs[6:8], inputs[8:]
    *terms, student_temp, teacher_temp, skip_same_view, mean, _, ctx.backend = rest
    ctx.settings = settings
    ctx.mark_non_differentiable(*output[1:])
    # Autograd would fill the others' gradients with zeros, K of them for a mean.
    ctx.set_materialize_grads(False)
    if ctx.backend == "reference":
        ctx.numbers = (student_temp, teacher_temp, skip_same_view, mean)
        ctx.save_for_backward(*operands, *terms)
    else:
        temps, center, log_u, _, row_weights, num_rows = terms
        ctx.numbers = (student_temp, teacher_temp, skip_same_view)
        terms = (temps, center, log_u, row_weights, num_rows)
        ctx.save_for_backward(*operands, *terms, *output[3:])


def _backward(ctx, dloss, *_):
    saved, rest = ctx.saved_tensors, (None,) * 15
    inputs = (*saved[:6], *ctx.settings, *saved[6:], *ctx.numbers)
    if ctx.backend == "reference":
        function = reference.linear_dino_cross_entropy
        grads = reference_gradients(ctx, function, inputs, dloss)
        return *grads[:2], None, None, grads[4], *rest
    wants_dfeatures, wants_dprototypes, _, _, wants_dlengths = ctx.needs_input_grad[:5]
    dfeatures, dprototypes, dlengths = torch.ops.fastssl.linear_dino_cross_entropy_backward(
        dloss, *inputs, wants_dfeatures, wants_dprototypes or wants_dlengths, ctx.backend
    )
    return (
        dfeatures if wants_dfeatures else None,
        dprototypes if wants_dprototypes else None,
        *(None, None),
        dlengths.to(saved[4].dtype) if wants_dlengths else None,
        *rest,
    )


_linear_dino_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _product_flops(features: torch.Size, prototypes: torch.Size) -> int:
    return 2 * features[0] * features[1] * features[2] * prototypes[0]


@register_flop_formula(torch.ops.fastssl.linear_dino_cross_entropy)
def _flops(student_features, student_prototypes, teacher_features, teacher_prototypes, *_, **__):
    student = _product_flops(student_features, student_prototypes)
    return student + _product_flops(teacher_features, teacher_prototypes)


@register_flop_formula(torch.ops.fastssl.linear_dino_cross_entropy_backward)
def _backward_flops(
    dloss, student_features, student_prototypes, teacher_features, teacher_prototypes, *rest, **_
):
    # The logits once more, and a product for each gradient.
    wanted = sum(rest[-3:-1])
    student = (1 + wanted) * _product_flops(student_features, student_prototypes)
    return student + _product_flops(teacher_features, teacher_prototypes)
