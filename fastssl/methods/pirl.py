"""Pretext-invariant representations (Misra and van der Maaten, 2020, arXiv:1912.01991).

B images of C channels, D features, p pixels along the side of a jigsaw's patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl import functional as F
from fastssl.data import Batch
from fastssl.kernels.common.checks import check_int
from fastssl.losses.common import check_fraction
from fastssl.methods.bank_contrast import BankContrast
from fastssl.methods.base import Method, Setting
from fastssl.methods.common import (
    check_views,
    cut,
    encode,
    encode_patches,
    num_features,
    rotations,
)
from fastssl.methods.views import MOCO_V1

PRETEXTS = ("jigsaw", "rotation")
_SIDE = 3
_PATCHES = _SIDE * _SIDE


def jigsaw_patches(images: Tensor, uniforms: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, 9, C, p, p]: of each cell of a grid of 3 x 3, row by row, a square.

    `uniforms` [B, 18] say where it lies in the cell, so that no edge runs on in its neighbour.
    """
    corners = []
    for side, where in zip(images.shape[2:], uniforms.chunk(2, dim=1), strict=True):
        cell = side // _SIDE
        corners.append((where * (cell - patch_size + 1)).long())
    number = torch.arange(_PATCHES, device=images.device)
    top = corners[0] + number // _SIDE * (images.shape[2] // _SIDE)
    left = corners[1] + number % _SIDE * (images.shape[3] // _SIDE)
    return cut(images, torch.stack([top, left], dim=2), patch_size)


def rotate(images: Tensor, uniforms: Tensor) -> Tensor:
    """Each image [C, S, S] turned by 0, 90, 180 or 270 degrees, as its number in [0, 1) says."""
    return rotations(images)[(uniforms * 4).long(), torch.arange(len(images), device=images.device)]


class PIRL(Method):
    """An image and what a pretext makes of it are both close to the image's row of a memory bank,
    and far from those of other samples::

        loss = lambda * nce(g(pretext(view 1)), bank) + (1 - lambda) * nce(f(view 0), bank)

    where nce is -log of a softmax over the sample's own row and num_negatives others. (The paper's
    has a term -log(1 - softmax) for each negative besides; softmax alone is the form that later
    methods kept.) The bank is a running mean of f.

    pretext: "jigsaw" takes a patch of patch_size pixels from each cell of a 3 x 3 grid, projects
        the encoder's features of each and then all nine, concatenated in a random order. The
        paper's views for it have 255 pixels and its patches 64. "rotation" turns the image by a
        random multiple of 90 degrees.
    transformed_weight: lambda.
    num_negatives: None for the whole dataset.
    """

    views = MOCO_V1

    def __init__(
        self,
        setting: Setting,
        *,
        pretext: str = "jigsaw",
        patch_size: int = 64,
        transformed_weight: float = 0.5,
        output_dim: int = 128,
        num_negatives: int | None = 32000,
        temperature: float = 0.07,
        bank_momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_views(setting, "pirl", 2)
        check_fraction(transformed_weight=transformed_weight)
        check_int("patch_size", patch_size, 1)
        _check_pretext(pretext, setting.views[-1].size, patch_size)
        self.model, self.seed = setting.encoder, setting.seed
        self.pretext, self.patch_size, self.weight = pretext, patch_size, transformed_weight
        width = num_features(setting)
        self.head = nn.Linear(width, output_dim)
        if pretext == "jigsaw":
            self.patch_head = nn.Linear(width, output_dim)
            width = _PATCHES * output_dim
        self.pretext_head = nn.Linear(width, output_dim)
        self.bank = BankContrast(
            setting.num_samples,
            output_dim,
            momentum=bank_momentum,
            temperature=temperature,
            num_negatives=num_negatives,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        num = 3 * _PATCHES + self.bank.num_uniforms
        uniforms = batch.uniforms(num, seed=self.seed, stream=F.STREAM_METHOD)
        pretext, negatives = uniforms.tensor_split([3 * _PATCHES], dim=1)
        embed = self.embed_jigsaw if self.pretext == "jigsaw" else self.embed_rotation
        features, transformed = embed(*batch.views, pretext)
        embedding = self.head(features)
        of_pretext, of_image = self.bank(batch.index, negatives, transformed, embedding)
        loss = self.weight * of_pretext + (1 - self.weight) * of_image
        self.bank.collect(batch.index, embedding)
        return {"loss": loss, "features": features.detach(), **self.bank.stats(loss)}

    def embed_jigsaw(self, images: Tensor, other: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """Features [B, D] of the images, and g of the other view."""
        where, order = uniforms.tensor_split([2 * _PATCHES], dim=1)
        patches = jigsaw_patches(other, where, self.patch_size)
        embedded = self.patch_head(encode_patches(self.model, patches))
        order = order.argsort(dim=1, stable=True)[:, :, None].expand_as(embedded)
        shuffled = embedded.gather(1, order)
        return self.model(images), self.pretext_head(shuffled.flatten(1))

    def embed_rotation(self, images: Tensor, other: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        """Features [B, D] of the images, and g of the other view."""
        both = encode(self.model, [images, rotate(other, uniforms[:, 0])])
        features, turned = both.chunk(2)
        return features, self.pretext_head(turned)


def _check_pretext(pretext: str, size: tuple[int, int], patch_size: int) -> None:
    """ValueError unless this can be done to views of this size."""
    if pretext not in PRETEXTS:
        names = ", ".join(PRETEXTS)
        raise ValueError(f"method.args.pretext must be one of {names}, got {pretext!r}")
    if pretext == "rotation" and size[0] != size[1]:
        raise ValueError(f"views must be square for the pretext rotation, got {list(size)}")
    if pretext == "jigsaw" and patch_size > min(size) // _SIDE:
        raise ValueError(
            f"method.args.patch_size must be at most a third of the views, {list(size)}, "
            f"got {patch_size}"
        )
