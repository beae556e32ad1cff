"""A small model around every loss: the step that tests repeat alone, on several ranks, compiled.

`forward(x)` takes [B, V, D], images first so that a rank's share is a slice, and returns the loss.
"""

import torch
from torch import Tensor, nn

import fastssl.losses as L
from fastssl import nn as fnn

V, D, E, K = 4, 6, 5, 7


class _Model(nn.Module):
    def __init__(self, loss: nn.Module, out_dim: int = E) -> None:
        super().__init__()
        self.project = nn.Linear(D, out_dim)
        self.loss = loss

    def units(self) -> list[nn.Module]:
        """What FSDP2 shards, from the inside out."""
        return [self]

    def views(self, x: Tensor, num: int = V) -> Tensor:  # [num * B, D]
        return x[:, :num].transpose(0, 1).flatten(0, 1)


class DINO(_Model):
    def __init__(self) -> None:
        super().__init__(L.DINOLoss(K, V, 0.04, 0.07, 3, 10, update_center=False), K)

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.project(self.views(x)), self.views(x.sin(), 2).repeat(1, 2)[:, :K], 1)


class _Heads(_Model):
    """Student and teacher heads as FSDP2 units of their own."""

    def __init__(self, loss: nn.Module, norm_last_layer: bool = True) -> None:
        super().__init__(loss, D)
        arguments = (D, K, False, norm_last_layer, 2, 8, 5)
        self.student = fnn.DINOHead(*arguments)
        self.teacher = fnn.DINOHead(*arguments).requires_grad_(False)

    def units(self) -> list[nn.Module]:
        return [self.student, self.teacher, self]


class DINOLinear(_Heads):
    def __init__(self, norm_last_layer: bool = True) -> None:
        loss = L.DINOLoss(K, V, 0.04, 0.07, 3, 10, update_center=False)
        super().__init__(loss, norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(self.views(x, 2), return_prototypes=True)
        return self.student(
            self.project(self.views(x)), loss=lambda student: self.loss.linear(student, teacher, 1)
        )


class DINOLinearScaled(DINOLinear):
    def __init__(self) -> None:
        super().__init__(norm_last_layer=False)


def masked(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of masked tokens (the images' number differs), their count and weights."""
    mask = x[:, :, 0] > x[:, :, 1]
    order = mask.flatten().logical_not().to(torch.int32).argsort(stable=True)
    weights = (1 / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(mask).flatten()
    return order, mask.sum(), weights[order]


class IBOT(_Model):
    centering = "softmax"

    def __init__(self) -> None:
        super().__init__(L.iBOTPatchLoss(K, centering=self.centering, update_center=False), K)

    def forward(self, x: Tensor) -> Tensor:
        order, count, weights = masked(x)
        student = self.project(x).flatten(0, 1)[order]
        teacher = x.sin().repeat(1, 1, 2)[..., :K].flatten(0, 1)[order]
        return self.loss(student, teacher, n_masked_patches=count, masks_weight=weights)


class IBOTSinkhorn(IBOT):
    centering = "sinkhorn_knopp"


class IBOTLinear(_Heads):
    centering = "softmax"

    def __init__(self) -> None:
        super().__init__(L.iBOTPatchLoss(K, centering=self.centering, update_center=False))

    def forward(self, x: Tensor) -> Tensor:
        order, count, weights = masked(x)
        with torch.no_grad():
            teacher = self.teacher(x.flatten(0, 1)[order], return_prototypes=True)
        return self.student(
            self.project(x).flatten(0, 1)[order],
            loss=lambda student: self.loss.linear(
                student,
                teacher,
                n_masked_patches=count,
                masks_weight=weights,
                num_images=x.shape[0],
            ),
        )


class IBOTLinearSinkhorn(IBOTLinear):
    centering = "sinkhorn_knopp"


class SwAV(_Model):
    def __init__(self) -> None:
        super().__init__(L.SwAVLoss((0, 2), (2, 2), queue_length=8, feat_dim=E))
        self.prototypes = fnn.SwAVPrototypes(E, K)

    def units(self) -> list[nn.Module]:
        return [self.prototypes, self]

    def forward(self, x: Tensor) -> Tensor:
        embedding = nn.functional.normalize(self.project(self.views(x)), dim=1)
        return self.prototypes(
            embedding, loss=lambda scores, weight: self.loss(scores, embedding, weight)
        )


class MSN(_Model):
    def __init__(self) -> None:
        super().__init__(L.MSNLoss(V, entropy_weight=0.1))
        self.prototypes = nn.Parameter(torch.randn(K, E))

    def forward(self, x: Tensor) -> Tensor:
        target = x[:, 0].cos()[:, :E]
        return self.loss(self.project(self.views(x)), target, self.prototypes)


class _Pair(_Model):
    """Losses of two views."""

    def __init__(self) -> None:
        super().__init__(self.make())

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.project(x[:, 0]), self.project(x[:, 1]))


class NTXent(_Pair):
    make = L.NTXentLoss


class InfoNCE(_Pair):
    make = L.InfoNCELoss


class Barlow(_Pair):
    make = L.BarlowTwinsLoss


class VICReg(_Pair):
    make = L.VICRegLoss


class Cosine(_Pair):
    make = L.NegativeCosineSimilarity


class KoLeo(_Model):
    def __init__(self) -> None:
        super().__init__(L.KoLeoLoss())

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.project(x[:, 0]))


class MoCo(_Model):
    def __init__(self) -> None:
        super().__init__(L.InfoNCELoss(0.2, queue_size=11, dim=E))

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.project(x[:, 0]), x[:, 1, :E])


class Gram(_Model):
    def __init__(self, img_level: bool = True) -> None:
        super().__init__(L.GramLoss(img_level=img_level))

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.project(x), x.sin())


class GramOfBatch(Gram):
    def __init__(self) -> None:
        super().__init__(img_level=False)


MODELS = {
    model.__name__: model
    for model in (
        *(DINO, DINOLinear, DINOLinearScaled, IBOT, IBOTSinkhorn, IBOTLinear, IBOTLinearSinkhorn),
        *(SwAV, MSN, NTXent, InfoNCE, MoCo, Barlow, VICReg, KoLeo, Cosine, Gram, GramOfBatch),
    )
}
