"""data2vec for images (Baevski et al., 2022, arXiv:2202.03555).

B images, N patches, M of them masked, D features.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from fastssl import models
from fastssl.data import Batch
from fastssl.data.masks import block_mask, context_ids
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import check_positive
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views
from fastssl.optim.schedules import Schedule

TARGETS = ("ffn", "block")


class Data2Vec(TeacherMethod):
    """At the masked patches, predict what the teacher's last blocks make of the whole image::

        target = mean over the last top_k blocks of norm(output of the block)
        loss = mean over images, masked patches and channels of smooth_l1(head(student), target)

    norm is a layer normalisation without parameters. The student is what is judged.

    mask_ratio, min_block: BEiT's blocks hide this share of the patches, at least so many at a time.
    top_k: 6 for ViT-B.
    target: a block's output is that of its "ffn" before the residual connection, which the paper
        found to be better, or that of the "block".
    beta: where the loss turns from quadratic to linear.
    """

    encoder_type = models.VisionTransformer
    model_args: ClassVar = {"use_mask_token": True}
    views = ({"scale": (0.08, 1.0), "jitter": 1.0, "saturation": 0.4, "hue": 0.0},)
    schedules: ClassVar = {"teacher_momentum": Schedule(0.9998)}

    def __init__(
        self,
        setting: Setting,
        *,
        mask_ratio: float = 0.6,
        min_block: int = 16,
        top_k: int = 6,
        target: str = "ffn",
        beta: float = 2.0,
    ) -> None:
        super().__init__()
        check_views(setting, "data2vec", 1)
        encoder = setting.encoder
        if encoder.mask_token is None:
            raise ValueError("model.args.use_mask_token must be true for data2vec, got false")
        check_int("method.args.top_k", top_k, 1, len(encoder.blocks))
        check_int("method.args.min_block", min_block, 1)
        check_positive(beta=beta)
        if target not in TARGETS:
            raise ValueError(
                f"method.args.target must be one of {', '.join(TARGETS)}, got {target!r}"
            )
        self.grid = encoder.patch_embed.grid_size(setting.views[0].size)
        num_patches = self.grid[0] * self.grid[1]
        self.num_masked = int(mask_ratio * num_patches)
        if not 1 <= self.num_masked <= num_patches:
            raise ValueError(
                f"method.args.mask_ratio must hide 1 to {num_patches} of {num_patches} patches, "
                f"got {mask_ratio}"
            )
        self.min_block, self.top_k, self.target, self.beta = min_block, top_k, target, beta
        self.seed = setting.seed
        self.make_teacher(encoder)
        self.head = nn.Linear(encoder.num_features, encoder.num_features)

    @property
    def model(self) -> nn.Module:
        return self.student

    def mask(self, batch: Batch) -> Tensor:
        """[B, N] bool, True for the patches to hide."""
        return block_mask(
            batch.index,
            self.grid,
            num_masked=self.num_masked,
            min_block=self.min_block,
            seed=self.seed,
            epoch=batch.epoch,
            view=batch.view,
        )

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """[B, N, D] of images [B, C, H, W]."""
        outputs: list[Tensor] = []
        with ExitStack() as hooks:
            for block in self.teacher.blocks[-self.top_k :]:
                # The branch ends in ls2, an identity where there is no LayerScale.
                source = block if self.target == "block" else block.ls2
                hooks.enter_context(
                    source.register_forward_hook(lambda _, __, output: outputs.append(output))
                )
            self.teacher.forward_features(images)
        prefix = self.teacher.num_prefix_tokens
        wide = torch.promote_types(outputs[0].dtype, torch.float32)
        outputs = [output[:, prefix:].to(wide) for output in outputs]
        return torch.stack([layer_norm(x, x.shape[2:]) for x in outputs]).mean(0)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mask = self.mask(batch)
        masked = context_ids(mask, self.num_masked)[:, :, None]  # [B, M, 1]
        tokens = self.student.forward_features(batch.images, masks=mask)
        patches = tokens[:, self.student.num_prefix_tokens :]
        predicted = self.head(patches.take_along_dim(masked, dim=1))
        wanted = self.targets(batch.images).take_along_dim(masked, dim=1)
        loss = smooth_l1_loss(predicted.to(wanted.dtype), wanted, beta=self.beta)
        return {"loss": loss, "features": patches.detach().mean(1)}

    def features(self, images: Tensor) -> Tensor:
        return self.student.features(images, pool="avg")
