"""What DINO, iBOT, DINOv2 and MSN share: student and teacher, and the rows of masked patches.

B images, V views, N patches, P prefix tokens, D features, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.losses import DINOLoss, iBOTPatchLoss
from fastssl.losses.common import Stats, check_positive
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views, encode
from fastssl.models import VisionTransformer
from fastssl.models.vit import class_token
from fastssl.nn import DINOHead
from fastssl.optim.schedules import Schedule


class Network(nn.Module):
    """A backbone and heads on its features. `patch_head` None: that of the image takes patches."""

    def __init__(
        self, backbone: nn.Module, head: nn.Module, patch_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head

    @property
    def head_of_patches(self) -> nn.Module:
        return self.head if self.patch_head is None else self.patch_head


class SelfDistillation(TeacherMethod):
    """A teacher, whose softmax has a scheduled temperature, and whose backbone is what is judged.

    With `warmup_steps` in schedules.teacher_temp the temperature rises from 0.04, as in the papers.
    """

    schedules: ClassVar[Mapping[str, Schedule]] = {
        **TeacherMethod.schedules,
        "teacher_temp": Schedule(0.07, start=0.04, kind="constant"),
    }
    student: Network
    teacher: Network

    def __init__(self) -> None:
        super().__init__()
        # On the device, where a new temperature is a new value and no new graph.
        temp = torch.tensor(self.schedules["teacher_temp"].base)
        self.register_buffer("teacher_temp", temp, persistent=False)

    @property
    def model(self) -> nn.Module:
        return self.teacher.backbone

    def before_step(self, values: Mapping[str, float]) -> None:
        super().before_step(values)
        check_positive(teacher_temp=values["teacher_temp"])
        self.teacher_temp.fill_(values["teacher_temp"])


def distill(
    loss: DINOLoss | iBOTPatchLoss,
    student: DINOHead,
    teacher: DINOHead,
    features: tuple[Tensor, Tensor],  # the student's and the teacher's
    *,
    fused: bool,
    **options: object,
) -> tuple[Tensor, Stats]:
    """The loss between a student's and a teacher's head, and what it has to tell.

    fused: no logits are stored, but made again in backward; see `linear_dino_cross_entropy`.
    """
    with torch.no_grad():
        targets = teacher(features[1], return_prototypes=fused)
    if fused:
        value, stats = student(
            features[0],
            loss=lambda output: loss.linear(output, targets, return_stats=True, **options),
        )
    else:
        value, stats = loss(student(features[0]), targets, return_stats=True, **options)
    num_prototypes = teacher.last_layer.weight_v.shape[0]
    share = stats["teacher_entropy"] / math.log(max(2, num_prototypes))
    return value, {**stats, "teacher_entropy_over_log_k": share}


def class_tokens(backbone: VisionTransformer, views: Sequence[Tensor]) -> Tensor:
    """[V * B, D], views one after the other."""
    return encode(lambda images: backbone.forward_features(images, select=class_token), views)


def check_global_views(setting: Setting, method: str) -> None:
    """ValueError unless a batch has two views or more, the first two of one size."""
    check_views(setting, method, 2, at_least=True)
    first, second = [view.size for view in setting.views for _ in range(view.number)][:2]
    if first != second:
        raise ValueError(
            f"views.groups must make the first two views of one size for {method}, got "
            f"{first} and {second}"
        )


class MaskedRows(NamedTuple):
    """Masked patches of a batch as rows of a number that does not depend on the mask."""

    index: Tensor  # [M] int64, places in tokens [B * (P + N)]
    count: Tensor  # [] int64, the rows that are masked patches; those behind are others
    weights: Tensor  # [M], 1 / (masked patches of the image)

    def of(self, tokens: Tensor) -> Tensor:  # [B, P + N, D] -> [M, D]
        return tokens.flatten(0, 1).index_select(0, self.index)

    def with_class_tokens(self, tokens: Tensor) -> Tensor:  # [B, P + N, D] -> [B + M, D]
        return torch.cat([class_token(tokens), self.of(tokens)])


def masked_rows(masks: Tensor, num_rows: int, num_prefix_tokens: int) -> MaskedRows:
    """The rows of masks [B, N], True where masked, with room for `num_rows` masked patches.

    The host does not wait for the masks. Of more than `num_rows` the last are left out. On a CPU,
    where nothing waits, there are no more rows than masked patches, or than one, unless compiled.
    """
    hidden = masks.flatten()
    if masks.device.type == "cpu" and not torch.compiler.is_compiling():
        num_rows = min(num_rows, max(1, int(hidden.sum())))
    index = hidden.logical_not().to(torch.uint8).argsort(stable=True)[:num_rows]
    weights = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks).flatten()
    image = index // masks.shape[1]
    return MaskedRows(
        index + num_prefix_tokens * (image + 1), hidden.sum().clamp(max=num_rows), weights[index]
    )
