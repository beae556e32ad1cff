"""Gram anchoring of patch features (DINOv3: Simeoni et al. 2025, arXiv 2508.10104)."""

from torch import Tensor, nn

from fastssl import functional as F
from fastssl.kernels.common.checks import check_tensor
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_not_swapped, resolved


class GramLoss(nn.Module):
    """Mean squared difference of the student's and the teacher's patch similarities.

    Arguments in the official order; see `functional.gram_loss` for what they do. The teacher gets
    no gradient. The mean over ranks of the gradients is that of one process on the whole batch.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
        *,
        group: Group = None,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError(
                "remove_neg must be False where remove_only_teacher_neg is True, got True"
            )
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg
        self.group = resolved(group)

    def forward(
        self,
        output_feats: Tensor,  # [B, N, D], the student's
        target_feats: Tensor,  # [B, N, E], the teacher's
    ) -> Tensor:
        check_tensor("output_feats", output_feats, dim=3)
        check_tensor("target_feats", target_feats, dim=3, device=output_feats.device)
        if output_feats.shape[:2] != target_feats.shape[:2]:
            raise ValueError(
                f"target_feats must have the B and N of output_feats {list(output_feats.shape)}, "
                f"got {list(target_feats.shape)}"
            )
        check_not_swapped("output_feats", output_feats, "target_feats", target_feats)
        return F.gram_loss(
            output_feats,
            target_feats,
            apply_norm=self.apply_norm,
            img_level=self.img_level,
            remove_neg=self.remove_neg,
            remove_only_teacher_neg=self.remove_only_teacher_neg,
            group=self.group,
        )
