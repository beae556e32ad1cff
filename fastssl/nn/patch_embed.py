"""Patch embedding of images and clips, of all patches or of the visible ones only."""

from torch import Tensor, nn

from fastssl import functional


class PatchEmbed(nn.Module):
    """Images [B, C, *S] (2 or 3 spatial dimensions) -> tokens [B, N, D] in row-major order.

    The weights are those of a convolution (keys: proj.weight, proj.bias) with `kernel_size`,
    `stride` (default: the kernel size, patches side by side) and `padding`. With `ids_keep` [B, K]
    only those patches are cut out and multiplied: [B, K, D]. `unit_size` and `unit_order` group
    tokens as in `functional.masked_patch_embed`, `ids_keep` then names units.

    Raises ValueError for a size that the stride does not divide, as pixels would be lost.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | int = 0,
    ) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}.get(len(kernel_size))
        if conv is None:
            raise ValueError(f"kernel_size must have 2 or 3 entries, got {kernel_size}")
        self.proj = conv(in_chans, embed_dim, kernel_size, stride or kernel_size, padding)

    def grid_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each spatial dimension of an image of `size`; ValueError as above."""
        conv = self.proj
        if len(size) != len(conv.stride) or any(
            s % t or s < 1 for s, t in zip(size, conv.stride, strict=True)
        ):
            divisors = " x ".join(map(str, conv.stride))
            raise ValueError(
                f"the image size must be divisible by {divisors}, got {' x '.join(map(str, size))}"
            )
        return tuple(
            (s + 2 * p - k) // t + 1
            for s, p, k, t in zip(size, conv.padding, conv.kernel_size, conv.stride, strict=True)
        )

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor | None = None,
        *,
        unit_size: int | tuple[int, ...] = 1,
        unit_order: tuple[int, ...] | None = None,
    ) -> Tensor:
        conv = self.proj
        if images.dim() != len(conv.stride) + 2 or images.shape[1] != conv.in_channels:
            axes = "D, H, W" if len(conv.stride) == 3 else "H, W"
            raise ValueError(
                f"images must have shape [B, {conv.in_channels}, {axes}], got {list(images.shape)}"
            )
        self.grid_size(images.shape[2:])
        if ids_keep is None:
            return conv(images).flatten(2).transpose(1, 2)
        return functional.masked_patch_embed(
            images,
            conv.weight,
            conv.bias,
            ids_keep,
            stride=conv.stride,
            padding=conv.padding,
            unit_size=unit_size,
            unit_order=unit_order,
        )
