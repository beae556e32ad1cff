"""Sine-cosine and interpolated position embeddings."""

import math

import pytest
import torch

from fastssl.nn import interpolate_pos_embed, sincos_pos_embed_2d


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_sincos_is_the_formula(grid):
    dim, columns = 16, grid[1]
    embed = sincos_pos_embed_2d(dim, grid, num_prefix_tokens=2)
    assert embed.dtype == torch.float32 and embed.shape == (2 + grid[0] * columns, dim)
    assert not embed[:2].any()
    for row in range(grid[0]):
        for column in range(columns):
            angles = {
                "column": [column / 10000 ** (i / 4) for i in range(4)],
                "row": [row / 10000 ** (i / 4) for i in range(4)],
            }
            expected = [
                function(angle)
                for axis in ("column", "row")
                for function in (math.sin, math.cos)
                for angle in angles[axis]
            ]
            torch.testing.assert_close(
                embed[2 + row * columns + column], torch.tensor(expected), atol=1e-6, rtol=0
            )


def test_sincos_refuses_a_width_not_divisible_by_four():
    with pytest.raises(ValueError, match="embed_dim must be divisible by 4, got 6"):
        sincos_pos_embed_2d(6, (2, 2))


def test_interpolation_keeps_the_prefix_and_the_same_grid():
    pos = torch.randn(1, 2 + 12, 5)
    assert interpolate_pos_embed(pos, (3, 4), (3, 4), 2) is pos
    out = interpolate_pos_embed(pos, (3, 4), (7, 2), 2)
    assert out.shape == (1, 2 + 14, 5)
    assert torch.equal(out[:, :2], pos[:, :2])


def test_interpolation_follows_the_axes():
    """A ramp along the columns stays one (PyTorch's cubic bends it by up to 0.05 of a step)."""
    ramp = torch.arange(8.0).expand(6, 8).reshape(1, 48, 1)
    out = interpolate_pos_embed(ramp, (6, 8), (3, 16)).reshape(3, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    inner = out[:, 4:12]  # away from the border
    torch.testing.assert_close(inner, expected[4:12].expand(3, -1), atol=0.05, rtol=0)


@pytest.mark.parametrize("old, new", [(37, 16), (14, 13), (16, 51), (14, 7)])
def test_interpolation_always_hits_the_grid(old, new):
    """Scale factors, as in dinov2 #333, can miss it by one."""
    pos = torch.ones(1, old * old, 2)
    out = interpolate_pos_embed(pos, (old, old), (new, new + 1))
    torch.testing.assert_close(out, torch.ones(1, new * (new + 1), 2))


def test_antialias_averages_what_plain_sampling_skips():
    checkers = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()
    pos = checkers.reshape(1, 256, 1) * 2 - 1
    plain = interpolate_pos_embed(pos, (16, 16), (5, 5))
    smooth = interpolate_pos_embed(pos, (16, 16), (5, 5), antialias=True)
    assert plain.abs().max() > 0.8 and smooth.abs().max() < 0.1


def test_interpolation_in_half_precision_is_computed_in_float32():
    pos = torch.randn(1, 16, 3).bfloat16()
    out = interpolate_pos_embed(pos, (4, 4), (6, 6))
    expected = interpolate_pos_embed(pos.float(), (4, 4), (6, 6)).bfloat16()
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_interpolation_in_time():
    pos = torch.randn(1, 1 + 5, 3)
    out = interpolate_pos_embed(pos, (5,), (8,), 1)
    expected = interpolate_pos_embed(pos, (5, 1), (8, 1), 1)
    assert out.shape == (1, 9, 3) and torch.equal(out, expected)


def test_interpolation_of_clips_is_separable():
    """What depends on time or on space alone is resampled along that alone."""
    time, space = torch.randn(1, 4, 1, 3), torch.randn(1, 1, 6, 3)
    clip = interpolate_pos_embed((time + space).flatten(1, 2), (4, 2, 3), (2, 5, 4))
    assert clip.shape == (1, 40, 3)
    time = interpolate_pos_embed(time.flatten(1, 2), (4,), (2,)).unsqueeze(2)
    space = interpolate_pos_embed(space.flatten(1, 2), (2, 3), (5, 4)).unsqueeze(1)
    torch.testing.assert_close(clip, (time + space).flatten(1, 2))


def test_interpolation_checks_the_grid():
    with pytest.raises(ValueError, match=r"new_grid must have as many .* got \(2, 2\)"):
        interpolate_pos_embed(torch.zeros(1, 12, 5), (2, 2, 3), (2, 2))
    with pytest.raises(ValueError, match=r"\[1, 1 \+ 3 \* 4, D\], got \[1, 12, 5\]"):
        interpolate_pos_embed(torch.zeros(1, 12, 5), (3, 4), (5, 5), 1)
