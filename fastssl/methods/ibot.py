"""iBOT (Zhou et al., 2022, arXiv:2111.07832).

B images, V views, N patches, D features, M rows of masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastssl.data import Batch
from fastssl.data.masks import block_mask, ibot_ratio
from fastssl.losses import DINOLoss, iBOTPatchLoss
from fastssl.methods.base import Setting
from fastssl.methods.common import num_features
from fastssl.methods.self_distillation import (
    MaskedRows,
    Network,
    SelfDistillation,
    check_global_views,
    class_tokens,
    distill,
    masked_rows,
)
from fastssl.methods.views import IBOT as VIEWS
from fastssl.models import VisionTransformer
from fastssl.nn import DINOHead


class Tokens(NamedTuple):
    """What student and teacher make of a batch, before the heads."""

    student: Tensor  # class tokens [V * B, D]; the first 2 * B of images with masked patches
    teacher: Tensor  # class tokens [2 * B, D]
    student_patches: Tensor  # [M, D]
    teacher_patches: Tensor  # [M, D], of the same patches, not masked
    rows: MaskedRows


class iBOT(SelfDistillation):
    """DINO on the class tokens, and on the patches that are masked for the student::

        row[m] = -sum_k q[m, k] log p[m, k]
        loss = DINO's + patch_weight * mean over images of the mean row[m] of the image

    of the first two views, where an image without masked patches counts as 0. Other views are not
    masked; those are with mask_probability, in blocks (Bao et al., 2022, arXiv:2106.08254) that
    make up an even random share in mask_ratio. The patches' center is that of the masked ones.

    out_dim, patch_out_dim: numbers of prototypes, equal for a shared_head.
    The rest as for DINO.
    """

    views = VIEWS
    encoder_type = VisionTransformer
    model_args: ClassVar[Mapping[str, Any]] = {"use_mask_token": True}

    def __init__(
        self,
        setting: Setting,
        *,
        out_dim: int = 8192,
        patch_out_dim: int = 8192,
        shared_head: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        mask_ratio: Sequence[float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        patch_weight: float = 1.0,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: str = "softmax",
        fused_head: bool = True,
    ) -> None:
        super().__init__()
        check_global_views(setting, type(self).__name__.lower())
        if len(mask_ratio) != 2 or not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(
                "method.args.mask_ratio must be 0 <= smallest <= largest <= 1, got "
                f"{list(mask_ratio)}"
            )
        if shared_head and out_dim != patch_out_dim:
            raise ValueError(
                "method.args.patch_out_dim must be out_dim for a shared_head, got "
                f"{patch_out_dim} and {out_dim}"
            )

        def head(num_prototypes: int) -> DINOHead:
            return DINOHead(
                num_features(setting),
                num_prototypes,
                norm_last_layer=norm_last_layer,
                hidden_dim=hidden_dim,
                bottleneck_dim=bottleneck_dim,
            )

        patch_head = None if shared_head else head(patch_out_dim)
        self.make_teacher(Network(setting.encoder, head(out_dim), patch_head))
        options = {
            "student_temp": student_temp,
            "center_momentum": center_momentum,
            "centering": centering,
            "update_center": False,
        }
        self.class_loss = DINOLoss(out_dim, setting.num_views, **options)
        self.patch_loss = iBOTPatchLoss(patch_out_dim, **options)
        self.mask_ratio = tuple(mask_ratio)
        self.mask_probability = mask_probability
        self.patch_weight = patch_weight
        self.fused_head = fused_head
        self.seed = setting.seed

    def masks(self, batch: Batch) -> Tensor:
        """bool [2 * B, N], True where the student does not see."""
        grid = self.student.backbone.patch_embed.grid_size(batch.images.shape[2:])
        masks = []
        for view in range(2):
            key = {
                "seed": self.seed,
                "epoch": batch.epoch,
                "view": batch.view * len(batch.views) + view,
            }
            ratio = ibot_ratio(
                batch.index, ratio=self.mask_ratio, probability=self.mask_probability, **key
            )
            wanted = (ratio * grid[0] * grid[1]).long().clamp(max=self._most(grid[0] * grid[1]))
            masks.append(block_mask(batch.index, grid, num_masked=wanted, **key))
        return torch.cat(masks)

    def _most(self, num_patches: int) -> int:
        """How many patches of an image may be masked."""
        return max(int(self.mask_ratio[1] * num_patches), 1)

    def _num_rows(self, num_images: int, num_patches: int) -> int:
        """Rows for the masked patches of all images: six deviations above their mean number."""
        low, high = self.mask_ratio
        mean = self.mask_probability * (low + high) / 2
        square = self.mask_probability * (low**2 + low * high + high**2) / 3
        deviation = math.sqrt(num_images * max(square - mean**2, 0.0))
        expected = num_patches * (num_images * mean + 6 * deviation)
        return max(1, min(math.ceil(expected), num_images * self._most(num_patches)))

    def tokens(self, batch: Batch) -> Tokens:
        images, masks = torch.cat(batch.views[:2]), self.masks(batch)
        student, teacher = self.student.backbone, self.teacher.backbone
        num_rows = self._num_rows(*masks.shape)
        rows = masked_rows(masks, num_rows, student.num_prefix_tokens)
        with torch.no_grad():
            targets = teacher.forward_features(images, select=rows.with_class_tokens)
        tokens = student.forward_features(images, masks=masks, select=rows.with_class_tokens)
        num_images = images.shape[0]
        classes = [tokens[:num_images]]
        if len(batch.views) > 2:
            classes.append(class_tokens(student, batch.views[2:]))
        patches = (tokens[num_images:], targets[num_images:])
        return Tokens(torch.cat(classes), targets[:num_images], *patches, rows)

    def losses(self, tokens: Tokens) -> dict[str, Tensor]:
        """What `forward` returns, but for the weight of what a subclass adds."""
        student, teacher = self.student, self.teacher
        options = {"fused": self.fused_head, "teacher_temp": self.teacher_temp}
        class_loss, stats = distill(
            self.class_loss,
            student.head,
            teacher.head,
            (tokens.student, tokens.teacher),
            **options,
        )
        patch_loss, patch_stats = distill(
            self.patch_loss,
            student.head_of_patches,
            teacher.head_of_patches,
            (tokens.student_patches, tokens.teacher_patches),
            n_masked_patches=tokens.rows.count,
            masks_weight=tokens.rows.weights,
            num_images=tokens.teacher.shape[0],
            **options,
        )
        return {
            "loss": class_loss + self.patch_weight * patch_loss,
            "features": tokens.teacher,
            "class_loss": class_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "patch_teacher_entropy": patch_stats["teacher_entropy"],
            **stats,
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(self.tokens(batch))
