"""The specification of gram_loss, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.kernels.common.collectives import Group, all_gather_with_grad


def gram_loss(
    student: Tensor,  # [B, N, D]
    teacher: Tensor,  # [B, N, E]
    apply_norm: bool,
    img_level: bool,
    remove_neg: bool,
    remove_only_teacher_neg: bool,
    group: Group = None,
) -> Tensor:  # []
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    grams = []
    for features in (student, teacher.detach()):
        own = features.to(dtype)
        if apply_norm:
            own = functional.normalize(own, dim=-1)
        every = own
        if not img_level:
            own = own.flatten(0, 1)
            every = all_gather_with_grad(own, group)
        with torch.autocast(student.device.type, enabled=False):
            grams.append(own @ every.mT)
    if remove_neg or remove_only_teacher_neg:
        grams[1] = grams[1].clamp(min=0)
    if remove_neg:
        grams[0] = grams[0].clamp(min=0)
    return (grams[0] - grams[1]).square().mean()
