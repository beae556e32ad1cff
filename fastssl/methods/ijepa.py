"""I-JEPA (Assran et al., 2023, arXiv:2301.08243).

B images, N patches, K of them in the context, M targets of T patches, D features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl import models
from fastssl.data import Batch
from fastssl.data.masks import context_ids, ijepa_blocks
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_views
from fastssl.nn import Block, sincos_pos_embed_2d
from fastssl.optim.schedules import Schedule

LOSSES = {"smooth_l1": nn.functional.smooth_l1_loss, "l2": nn.functional.mse_loss}


class JEPAPredictor(nn.Module):
    """What the patches at `targets` are, seen from the context: a narrow ViT whose input is the
    context and, in each target's places, a learned token with their positions."""

    pos_embed: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("pos_embed", sincos_pos_embed_2d(width, grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        context: Tensor,  # [B, K, D]
        ids: Tensor,  # [B, K], where it lies
        targets: Tensor,  # [B, M, T]
    ) -> Tensor:  # [B, M, T, D]
        num_targets, size = targets.shape[1:]
        context = self.embed(context) + self.pos_embed[ids]
        context = context[:, None].expand(-1, num_targets, -1, -1)
        asked = self.mask_token + self.pos_embed[targets]
        # Targets do not see each other: each is a sequence of its own.
        x = torch.cat([context, asked.to(context.dtype)], dim=2).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, -size:])).unflatten(0, (-1, num_targets))


class IJEPA(TeacherMethod):
    """From one block of an image, predict the teacher's features of others::

        loss = mean over images, targets m and patches j in m of
            distance(predictor(student(context), positions of m)[j], norm(teacher(image)[j]))

    The teacher, an average of the student, sees the whole image; norm is a layer normalisation
    without parameters. The teacher is what is judged, by the mean of its patch tokens.

    predictor_dim, predictor_depth, predictor_heads: 384 and 6 for ViT-B, 12 for ViT-L and ViT-H;
        None is the encoder's number of heads.
    num_targets, target_scale, target_aspect, context_scale: see `ijepa_blocks`.
    context_keep: share of the patches that each context has. It is static, so that no sample
        depends on its batch or on the number of processes: contexts with fewer are placed anew,
        those with more lose their last rows. 0.3 is, on average, the smallest context of 128
        images, to which the paper's batches are cut; more than the targets leave would show them.
    loss: "l2", as in the paper's formula, or "smooth_l1" as in the experiments that it reports,
        where single channels that the teacher exaggerates do not rule the gradient.
    """

    encoder_type = models.VisionTransformer
    views = ({"scale": (0.3, 1.0), "flip": 0.0},)
    schedules: ClassVar = {"teacher_momentum": Schedule(0.996, final=1.0, kind="linear")}

    def __init__(
        self,
        setting: Setting,
        *,
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int | None = None,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_keep: float = 0.3,
        loss: str = "smooth_l1",
    ) -> None:
        super().__init__()
        check_views(setting, "ijepa", 1)
        if loss not in LOSSES:
            raise ValueError(f"method.args.loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        encoder = setting.encoder
        self.grid = encoder.patch_embed.grid_size(setting.views[0].size)
        self.num_keep = int(context_keep * self.grid[0] * self.grid[1])
        if not 1 <= self.num_keep <= self.grid[0] * self.grid[1]:
            raise ValueError(
                "method.args.context_keep must be a share that leaves at least one of "
                f"{self.grid[0]} x {self.grid[1]} patches, got {context_keep}"
            )
        heads = predictor_heads or encoder.blocks[0].attn.num_heads
        self.predictor = JEPAPredictor(
            encoder.num_features, self.grid, predictor_dim, predictor_depth, heads
        )
        self.make_teacher(encoder)
        self.distance, self.seed = LOSSES[loss], setting.seed
        self.blocks_like = {
            "num_targets": num_targets,
            "target_scale": tuple(target_scale),
            "target_aspect": tuple(target_aspect),
            "context_scale": tuple(context_scale),
        }

    @property
    def model(self) -> nn.Module:
        return self.teacher

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Patches of the context [B, K] and of the targets [B, M, T]."""
        seen, targets = ijepa_blocks(
            batch.index,
            self.grid,
            step=batch.step,
            seed=self.seed,
            view=batch.view,
            min_keep=self.num_keep,
            **self.blocks_like,
        )
        return context_ids(seen, self.num_keep), targets

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        ids, targets = self.masks(batch)
        prefix = self.student.num_prefix_tokens
        with torch.no_grad():
            tokens = self.teacher.forward_features(batch.images)[:, prefix:]
            wanted = nn.functional.layer_norm(tokens, tokens.shape[2:])
            wanted = wanted.take_along_dim(targets.flatten(1)[:, :, None], dim=1)
        context = self.student.forward_features(batch.images, ids_keep=ids)[:, prefix:]
        predicted = self.predictor(context, ids, targets)
        loss = self.distance(predicted.flatten(1, 2).to(wanted.dtype), wanted)
        return {"loss": loss, "features": tokens.mean(1)}

    def features(self, images: Tensor) -> Tensor:
        return self.teacher.features(images, pool="avg")
