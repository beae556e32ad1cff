"""Contrastive predictive coding of images (van den Oord et al., 2018, arXiv:1807.03748; version 2:
Hénaff et al., 2020, arXiv:1905.09272).

B images of C channels in a grid of R x S overlapping patches, p pixels along the side, D features,
T the dimension in which predictions and targets meet.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import check_positive
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, encode_patches, num_features
from fastssl.methods.views import NPID as VIEWS


class MaskedConvBlock(nn.Module):
    """[B, D, R, S] -> the same; a row of the output is a function of the rows up to it."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, hidden_dim, 1)
        self.across = nn.Conv2d(hidden_dim, hidden_dim, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(hidden_dim, hidden_dim, (2, 1))
        self.expand = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.across(relu(self.reduce(x)))
        # A row of zeros above, none below: what is below stays unseen.
        hidden = relu(self.down(pad(hidden, (0, 0, 1, 0))))
        return x + self.expand(hidden)


def patch_grid(images: Tensor, patch_size: int, stride: int) -> Tensor:
    """[B, C, H, W] -> [B, R, S, C, p, p], overlapping patches of each image."""
    patches = images.unfold(2, patch_size, stride).unfold(3, patch_size, stride)
    return patches.permute(0, 2, 3, 1, 4, 5)


class CPC(Method):
    """From a patch and all rows above it, tell the patch some rows below from all other patches::

        z = encoder(patch)      c = context(z)      loss = sum over k of
            mean over i of -log(exp(s p[i] . z'[i]) / sum_j exp(s p[i] . z'[j]))

    where p[i] = W_k c is the prediction, and z'[i] = V z the target, k rows below. j runs over the
    patches of all images of the batch that are k or more rows from the top, which every process
    sees. The context is made by masked convolutions without batch normalisation, which would let
    rows below be seen. For an encoder without it, too, as the paper advises, use layer or group
    normalisation.

    patch_size, stride: in pixels; what does not fill a patch at the lower and right edge is unused.
    steps: the k. A patch one row below shares half of its pixels with the context.
    target_dim: T. scale: s.
    hidden_dim, num_layers: of the context.
    """

    views = VIEWS

    def __init__(
        self,
        setting: Setting,
        *,
        patch_size: int = 64,
        stride: int = 32,
        steps: Sequence[int] = (3,),
        target_dim: int = 64,
        scale: float = 0.1,
        hidden_dim: int = 256,
        num_layers: int = 5,
    ) -> None:
        super().__init__()
        check_views(setting, "cpc", 1)
        sizes = {"patch_size": patch_size, "stride": stride, "target_dim": target_dim}
        for name, value in (sizes | {"hidden_dim": hidden_dim, "num_layers": num_layers}).items():
            check_int(name, value, 1)
        check_positive(scale=scale)
        _check_steps(steps, setting.views[0].size, patch_size, stride)
        self.model, self.steps, self.scale = setting.encoder, tuple(steps), scale
        self.patch_size, self.stride = patch_size, stride
        width = num_features(setting)
        self.context = nn.Sequential(
            *(MaskedConvBlock(width, hidden_dim) for _ in range(num_layers)), nn.ReLU()
        )
        self.target = nn.Linear(width, target_dim)
        self.predictors = nn.ModuleList(nn.Linear(width, target_dim) for _ in steps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        patches = patch_grid(batch.images, self.patch_size, self.stride)
        features = encode_patches(self.model, patches.flatten(1, 2))
        latents = features.unflatten(1, patches.shape[1:3])  # [B, R, S, D]
        context = self.context(latents.movedim(-1, 1)).movedim(1, -1)
        targets = self.target(latents)
        loss = sum(
            F.info_nce(
                predictor(context[:, :-step]).flatten(0, 2),
                targets[:, step:].flatten(0, 2),
                temperature=1 / self.scale,
                normalize=False,
            )
            for step, predictor in zip(self.steps, self.predictors, strict=True)
        )
        return {"loss": loss, "features": features.detach().flatten(0, 1)}


def _check_steps(steps: Sequence[int], size: tuple[int, int], patch_size: int, stride: int) -> None:
    """ValueError unless every step stays within the grid."""
    rows = max((size[0] - patch_size) // stride + 1, 0)
    if not steps:
        raise ValueError("method.args.steps must have at least one step, got none")
    for step in steps:
        check_int("steps", step, 1)
    if max(steps) >= rows or size[1] < patch_size:
        raise ValueError(
            f"method.args.steps must be below the number of rows of patches, which is {rows} for "
            f"views of {list(size)}, got {list(steps)}"
        )
