"""Context prediction (Doersch et al., 2015, arXiv:1505.05192). B images, p the side of a patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.kernels.common.checks import check_int
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import check_views, cut, encode, num_features

COLORS = ("drop", "project", "none")
_NUM_PLACES = 7  # the neighbour, the grid's row and column, two patches' shifts in both


class ContextPrediction(Method):
    """Which of the eight neighbours of a patch is this other patch? Cross-entropy.

    The two are the middle and another cell of a 3 x 3 grid that lies anywhere in the view; what is
    drawn is a function of (seed, epoch, index, view). Both go through the encoder, their features
    [2 D] through two layers.

    patch_size, gap, jitter: side of a patch, distance between neighbours and largest shift of each
        patch up, down or sideways, in pixels; 96, 48 and 7 in the paper, of larger images.
    color: against chromatic aberration, which tells where in the picture a patch was. "drop" puts
        noise with a hundredth of the standard deviation in place of all channels but one, another
        in each patch; "project" takes out the direction from green to magenta, (-1, 2, -1).
    hidden_dim: of the classifier.
    """

    # Shapes as they are, and crops that leave the grid something to see.
    views = ({"scale": (0.35, 1.0), "ratio": (1.0, 1.0)},)

    def __init__(
        self,
        setting: Setting,
        *,
        patch_size: int = 48,
        gap: int = 24,
        jitter: int = 4,
        color: str = "drop",
        hidden_dim: int = 4096,
    ) -> None:
        super().__init__()
        check_views(setting, "context_prediction", 1)
        check_int("method.args.patch_size", patch_size, 1)
        check_int("method.args.gap", gap, 0)
        check_int("method.args.jitter", jitter, 0)
        if color not in COLORS:
            raise ValueError(f"method.args.color must be one of {', '.join(COLORS)}, got {color!r}")
        side, smallest = 3 * patch_size + 2 * gap + 2 * jitter, min(setting.views[0].size)
        if side > smallest:
            raise ValueError(
                "method.args of context_prediction must fit into the view, 3 * patch_size + "
                f"2 * gap + 2 * jitter <= {smallest}, got {side}"
            )
        self.patch_size, self.step, self.jitter = patch_size, patch_size + gap, jitter
        self.grid_side, self.color, self.seed = side, color, setting.seed
        self.model = setting.encoder
        self.head = nn.Sequential(
            nn.Linear(2 * num_features(setting), hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 8)
        )

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Neighbours [B], 0 to 7 row by row, and the upper left corners [B, 2, 2] of the patches:
        (middle, neighbour), (row, column)."""
        uniform = self._uniforms(batch, _NUM_PLACES)
        neighbour = (8 * uniform[:, 0]).long()
        cell = neighbour + (neighbour >= 4)  # the middle is cell 4
        cells = torch.stack([torch.full_like(cell, 4), cell], dim=1)
        cells = torch.stack([cells // 3, cells % 3], dim=2)  # [B, 2, 2]
        size = torch.tensor(batch.images.shape[2:], device=uniform.device)
        origin = (uniform[:, 1:3] * (size - self.grid_side + 1)).long()
        shift = (uniform[:, 3:].unflatten(1, (2, 2)) * (2 * self.jitter + 1)).long()
        return neighbour, origin[:, None] + cells * self.step + shift

    def patches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Neighbours [B] and the patches [B, 2, C, p, p], with what `color` does to them."""
        neighbour, corners = self.places(batch)
        patches = cut(batch.images, corners, self.patch_size)
        if self.color == "drop":
            patches = self._drop(patches, batch)
        elif self.color == "project":
            patches = self._project(patches)
        return neighbour, patches

    def _drop(self, patches: Tensor, batch: Batch) -> Tensor:
        num_channels, numel = patches.shape[2], patches[0].numel()
        uniform = self._uniforms(batch, _NUM_PLACES + 2 + numel)
        _, channels, noise = uniform.split([_NUM_PLACES, 2, numel], dim=1)
        kept = (channels * num_channels).long()[:, :, None]  # [B, 2, 1]
        channel = torch.arange(num_channels, device=kept.device)
        is_kept = (channel == kept)[..., None, None]
        std = patches.std(dim=(3, 4), keepdim=True)
        std = std.take_along_dim(kept[..., None, None], dim=2)
        # Half a step of the generator away from 0, where the quantile is infinite.
        normal = torch.special.ndtri(noise.double() + 2**-25).view_as(patches).to(patches.dtype)
        return patches.where(is_kept, 0.01 * std * normal)

    @staticmethod
    def _project(patches: Tensor) -> Tensor:
        if patches.shape[2] != 3:
            raise ValueError(f"method.args.color project needs 3 channels, got {patches.shape[2]}")
        magenta = patches.new_tensor([-1.0, 2.0, -1.0]) / 6**0.5
        share = torch.einsum("bkchw,c->bkhw", patches, magenta)
        return patches - share[:, :, None] * magenta[:, None, None]

    def _uniforms(self, batch: Batch, num: int) -> Tensor:
        return batch.uniforms(num, seed=self.seed, stream=F.STREAM_METHOD)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        neighbour, patches = self.patches(batch)
        features = encode(self.model, patches.unbind(1))
        logits = self.head(torch.cat(features.chunk(2), dim=1))
        loss = nn.functional.cross_entropy(logits, neighbour)
        accuracy = (logits.detach().argmax(1) == neighbour).float().mean()
        return {"loss": loss, "features": features.detach(), "accuracy": accuracy}
