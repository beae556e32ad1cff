"""PatchEmbed: all patches, visible patches, sizes."""

import pytest
import torch

from fastssl.nn import PatchEmbed


@pytest.mark.parametrize(
    "kernel, size", [((4, 4), (8, 12)), ((2, 4), (6, 8)), ((2, 4, 2), (4, 8, 6))]
)
def test_embeds_every_patch_in_row_major_order(kernel, size):
    embed = PatchEmbed(3, 5, kernel)
    images = torch.randn(2, 3, *size)
    tokens = embed(images)
    grid = embed.grid_size(size)
    assert grid == tuple(s // k for s, k in zip(size, kernel, strict=True))
    assert tokens.shape == (2, torch.tensor(grid).prod(), 5)
    last = images[(slice(None), slice(None), *(slice(-k, None) for k in kernel))]
    expected = last.flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(tokens[:, -1], expected)
    second = images[
        (
            slice(None),
            slice(None),
            *(slice(0, k) for k in kernel[:-1]),
            slice(kernel[-1], 2 * kernel[-1]),
        )
    ]
    expected = second.flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(tokens[:, 1], expected)


@pytest.mark.parametrize("kernel, size", [((4, 4), (8, 12)), ((2, 4, 2), (4, 8, 6))])
def test_visible_patches_equal_the_gather_of_all(kernel, size):
    embed = PatchEmbed(3, 5, kernel).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ids_keep = torch.tensor([[4, 0, 3], [1, 5, 2]], dtype=torch.int32)
    every = embed(images)
    expected = every.gather(1, ids_keep.long()[..., None].expand(-1, -1, 5))
    visible = embed(images, ids_keep)
    torch.testing.assert_close(visible, expected)
    inputs = (embed.proj.weight, embed.proj.bias)
    weights = torch.randn_like(visible)
    torch.testing.assert_close(
        torch.autograd.grad((visible * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )


def test_grid_of_overlapping_patches():
    embed = PatchEmbed(3, 5, (7, 7), stride=(4, 4), padding=(3, 3))
    assert embed.grid_size((32, 64)) == (8, 16)
    assert embed(torch.randn(1, 3, 32, 64)).shape == (1, 128, 5)


def test_refuses_what_it_cannot_cut():
    embed = PatchEmbed(3, 5, (4, 6))
    with pytest.raises(ValueError, match="image size must be divisible by 4 x 6, got 8 x 8"):
        embed(torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match="image size must be divisible by 4 x 6, got 0 x 6"):
        embed.grid_size((0, 6))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[1, 4, 8, 12\]"):
        embed(torch.randn(1, 4, 8, 12))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[3, 8, 12\]"):
        embed(torch.randn(3, 8, 12))
    with pytest.raises(ValueError, match="kernel_size must have 2 or 3 entries"):
        PatchEmbed(3, 5, (4,))
