"""Masked Siamese networks (Assran et al., 2022, arXiv:2204.07141).

B images, V anchor views, N patches, D features, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.data import Batch
from fastssl.data.masks import msn_keep
from fastssl.losses import MSNLoss
from fastssl.methods.base import Setting
from fastssl.methods.common import TeacherMethod, check_ratio, num_features
from fastssl.methods.self_distillation import Network, check_global_views, class_tokens
from fastssl.methods.views import MSN as VIEWS
from fastssl.models import VisionTransformer
from fastssl.models.vit import class_token
from fastssl.nn import MSNProjectionHead


class MSN(TeacherMethod):
    """Views of an image with patches left out are assigned to prototypes as its whole view is::

        p[v] = softmax(cos(student(view[v]), prototypes) / tau), without mask_ratio of the patches
        q = Sinkhorn(softmax(cos(teacher(view[0]), prototypes) / (T * tau)))
        loss = mean over v and images of -sum_k q log p[v] + me_max_weight * (ln K - H(mean p))

    Further views of the first one's size lose random patches; smaller ones, which are whole, are
    the paper's focal masks. mask_ratio is the paper's for ViT-S; 0.3 for ViT-B and 0.7 for ViT-L/7.

    num_prototypes, hidden_dim, output_dim: K, and of the projection head.
    tau, T, me_max_weight, entropy_weight, sinkhorn_iterations: see `MSNLoss`.
    """

    views = VIEWS
    encoder_type = VisionTransformer
    student: Network
    teacher: Network

    def __init__(
        self,
        setting: Setting,
        *,
        num_prototypes: int = 1024,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        mask_ratio: float = 0.15,
        tau: float = 0.1,
        T: float = 0.25,
        me_max_weight: float = 1.0,
        entropy_weight: float = 0.0,
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        check_global_views(setting, "msn")
        check_ratio(mask_ratio)
        head = MSNProjectionHead(num_features(setting), hidden_dim, output_dim)
        self.make_teacher(Network(setting.encoder, head))
        # Of this module, which FSDP2 has whole in `forward`.
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, output_dim))
        nn.init.uniform_(self.prototypes, -(output_dim**-0.5), output_dim**-0.5)
        self.loss = MSNLoss(
            setting.num_views - 1,
            tau,
            me_max_weight=me_max_weight,
            entropy_weight=entropy_weight,
            sinkhorn_iterations=sinkhorn_iterations,
        )
        self.mask_ratio, self.T, self.seed = mask_ratio, T, setting.seed

    @property
    def model(self) -> nn.Module:
        return self.teacher.backbone

    def ids_keep(self, batch: Batch, view: int) -> Tensor:
        """[B, number kept], the patches of a masked view that the student sees."""
        grid = self.student.backbone.patch_embed.grid_size(batch.images.shape[2:])
        num_patches = grid[0] * grid[1]
        return msn_keep(
            batch.index,
            grid,
            num_keep=num_patches - int(num_patches * self.mask_ratio),
            focal=False,
            seed=self.seed,
            epoch=batch.epoch,
            view=batch.view * len(batch.views) + view,
        )

    def anchors(self, batch: Batch) -> Tensor:
        """Class tokens [V * B, D] of the student: masked views, then focal ones."""
        backbone, size = self.student.backbone, batch.images.shape
        masked = [v for v in range(1, len(batch.views)) if batch.views[v].shape == size]
        focal = [view for view in batch.views[1:] if view.shape != size]
        images = torch.cat([batch.views[v] for v in masked])
        ids_keep = torch.cat([self.ids_keep(batch, v) for v in masked])
        tokens = backbone.forward_features(images, ids_keep=ids_keep, select=class_token)
        return torch.cat([tokens, class_tokens(backbone, focal)]) if focal else tokens

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            features = class_tokens(self.teacher.backbone, batch.views[:1])
            targets = self.teacher.head(features)
        anchors = self.student.head(self.anchors(batch))
        loss, stats = self.loss(anchors, targets, self.prototypes, self.T, return_stats=True)
        return {"loss": loss, "features": features, **stats}
