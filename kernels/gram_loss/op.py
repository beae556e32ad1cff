"""The public op fastssl::gram_loss: checks, backends, fake implementation, autograd."""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastssl.kernels.common import collectives, dispatch
from fastssl.kernels.common.checks import check_shape, check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.kernels.common.eager import custom_op
from fastssl.kernels.gram_loss import reference


def _example(device: torch.device) -> tuple:
    return torch.zeros(2, 4, 6, device=device), torch.zeros(2, 4, 8, device=device)


OP = dispatch.register(
    "gram_loss",
    {"triton": dispatch.cannot_run_triton, "cpp": dispatch.cannot_run_cpp},
    _example,
)


def gram_loss(
    student: Tensor,  # [B, N, D]
    teacher: Tensor,  # [B, N, E]
    *,
    apply_norm: bool = True,
    img_level: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:  # [] float32, float64 where student or teacher are
    """Gram anchoring of DINOv3 (Simeoni et al. 2025, arXiv 2508.10104): mean squared difference
    between the student's and the teacher's matrix of similarities of N patches.

    apply_norm makes every patch's features a vector of length 1 (similarities are cosines);
    img_level compares the N x N similarities inside each image, otherwise all pairs of the B * N
    patches of the batch (of all processes). remove_neg counts negative similarities of both as 0,
    remove_only_teacher_neg those of the teacher. The teacher gets no gradient; its width may
    differ from the student's.

    Several processes: ranks of `group` (None: the default group) hold equally many patches, and
    loss and gradients, averaged over ranks, are those of one process on the whole batch. img_level
    sends nothing; otherwise patches are gathered once, and in backward a number per process.

    Autocast does not touch the inputs. Raises ValueError or TypeError for arguments that do not
    fit, naming them.
    """
    check_tensor("student", student, dim=3)
    check_tensor("teacher", teacher, dim=3, device=student.device)
    check_shape("teacher", teacher, (*student.shape[:2], None), "[B, N, E]")
    for name, value in (("student", student), ("teacher", teacher)):
        if 0 in value.shape:
            raise ValueError(f"{name} must not be empty, got {list(value.shape)}")
    if remove_neg and remove_only_teacher_neg:
        raise ValueError("remove_only_teacher_neg must be False where remove_neg is True")
    settings = (bool(apply_norm), bool(img_level), bool(remove_neg), bool(remove_only_teacher_neg))
    teacher = teacher.detach()
    name = dispatch.choose_backend(OP, backend, student, teacher)
    group = "" if img_level else collectives.group_name(group)
    if name == "reference":
        return reference.gram_loss(student, teacher, *settings, group)
    if not img_level:
        student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
    apply_norm, _, clamp_student, clamp_teacher = settings
    wants_gradient = torch.is_grad_enabled() and student.requires_grad
    return torch.ops.fastssl.gram_loss(
        *(student.contiguous(), teacher.contiguous(), apply_norm, clamp_student),
        *(clamp_student or clamp_teacher, wants_gradient, group, name),
    )[0]


def _kernels(backend: str) -> ModuleType:
    if backend == "cpp":
        from fastssl.kernels.gram_loss import cpp_kernel as module
    else:
        from fastssl.kernels.gram_loss import triton_kernel as module
    return module


@custom_op("fastssl::gram_loss")
def _gram_loss(
    student: Tensor,
    teacher: Tensor,
    apply_norm: bool,
    clamp_student: bool,
    clamp_teacher: bool,
    wants_gradient: bool,
    group: str,
    backend: str,
) -> list[Tensor]:
    """loss [], and its gradient of the student in float32, [W, I, N, D]: the part that comes from
    the pairs with each process's patches. Empty unless wanted."""
    kernels = _kernels(backend)
    world, (images, patches, _) = collectives.world_size(group), student.shape
    features = (student.flatten(0, 1), teacher.flatten(0, 1))
    rows = tuple(kernels.prepare(x, apply_norm) for x in features)
    everyone = [collectives.all_gather_with_grad(x, group).chunk(world) for x in features]
    loss, gradients = _gram_loss_fake(
        *(student, teacher, apply_norm, clamp_student, clamp_teacher, wants_gradient),
        *(group, backend),
    )
    count, total = images * patches**2 * world, 0.0
    for process in range(world):
        others = None
        if process != collectives.rank(group):
            others = tuple(kernels.prepare(x[process], apply_norm) for x in everyone)
        gradient = gradients[process].flatten(0, 1) if wants_gradient else None
        total = total + kernels.compare(
            *(images, rows, others, clamp_student, clamp_teacher, 4 / count, gradient)
        )
    return [loss.copy_(total / count), gradients]


@_gram_loss.register_fake
def _gram_loss_fake(student, teacher, apply_norm, clamp_student, clamp_teacher, wants, group, _):
    shape = (collectives.world_size(group), *student.shape) if wants else (0,)
    return [student.new_empty(size, dtype=torch.float32) for size in ((), shape)]


def _setup_context(ctx, inputs, output):
    ctx.dtype, ctx.group = inputs[0].dtype, inputs[6]
    # Autograd would fill the gradient of the gradient with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, grads):
    (parts,) = ctx.saved_tensors
    # A pair of patches is in the loss of the rank of either.
    weights = collectives.all_gather_with_grad(grads[0].reshape(1), ctx.group)
    weights = (weights + grads[0]) / 2
    gradient = parts[0] * weights[0]
    for process in range(1, len(parts)):
        gradient = torch.addcmul(gradient, parts[process], weights[process])
    return gradient.to(ctx.dtype), *(None,) * 7


_gram_loss.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.fastssl.gram_loss)
def _flops(student, teacher, apply_norm, clamp_student, clamp_teacher, wants, group, *_, **__):
    """Forward, and with it the gradient's product."""
    images, patches, width = student
    pairs = images * patches**2 * collectives.world_size(group)
    return 2 * pairs * (width + teacher[2] + wants * width)
