"""Which patches a method hides, as batched tensor code that is a function of keys alone.

B images, a grid of N = rows * columns patches in row-major order. Every generator takes `index` [B]
int64, the stable ids of the samples, and works on its device without waiting for it; row b depends
on (seed, epoch, view, index[b]) and the other arguments of that row, never on its neighbours. Only
block_mask needs a function, exp, that two kinds of device may round differently; there, rarely, a
block's edge may move from one to the other.

index, grid, seed, epoch and view mean the same in all of them. Errors: TypeError for the kind of an
argument, ValueError for its value; values inside of tensors are not read, but clamped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import functional as F
from fastssl.kernels.common.checks import check_int, check_shape, check_tensor

Grid = tuple[int, int]  # rows, columns

# The first Philox block of a sample is ibot_ratio's, so that the ratio says nothing of the mask.
_NUM_RATIO_UNIFORMS = 4
# No image has this id: in its place stands the step, whose numbers choose I-JEPA's sizes.
_STEP_ID = 2**63 - 1


def random_mask(
    index: Tensor,
    grid: Grid,
    *,
    ratio: float | Tensor,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """bool [B, N], True for the int(N * ratio) patches to hide, drawn evenly.

    ratio: of [0, 1], one for all or a float tensor [B].
    """
    num_patches = _check_index_and_grid(index, grid)
    if isinstance(ratio, Tensor):
        _check_per_sample("ratio", ratio, index, (torch.float32, torch.bfloat16, torch.float16))
        num_masked = (ratio.float() * num_patches).long()[:, None]
    else:
        _check_fraction("ratio", ratio)
        num_masked = int(num_patches * ratio)
    noise = _uniforms(index, num_patches, seed, epoch, view)
    return _ranks(noise) >= num_patches - num_masked


def block_mask(
    index: Tensor,
    grid: Grid,
    *,
    num_masked: int | Tensor,
    seed: int,
    epoch: int = 0,
    view: int = 0,
    min_block: int = 4,
    max_block: int | None = None,
    aspect: float = 0.3,
    exact: bool = True,
    num_attempts: int = 16,
) -> Tensor:
    """bool [B, N], True for patches to hide: BEiT's block-wise masking (arXiv 2106.08254), which
    iBOT and DINOv2 use too.

    A block has an even random area, from min_block to what is still to hide, and a log-uniform
    height / width in [aspect, 1 / aspect]; rounded to whole patches and cut to the grid it is
    put anywhere and kept unless it would hide more new patches than are left.

    num_masked: how many to hide, one for all or int64 [B].
    min_block, max_block: patches of a block (BEiT: at least 16 of 14 x 14); None for no bound.
    exact: hide random further patches where the blocks fall short, so that the count is num_masked;
        otherwise it is at most that.
    num_attempts: blocks tried, the same number for every sample.
    """
    num_patches = _check_index_and_grid(index, grid)
    if isinstance(num_masked, Tensor):
        _check_per_sample("num_masked", num_masked, index, (torch.int64,))
        wanted = num_masked.clamp(0, num_patches)
    else:
        check_int("num_masked", num_masked, 0, num_patches)
        wanted = torch.full_like(index, num_masked)
    check_int("min_block", min_block, 1)
    max_block = max(num_patches, min_block) if max_block is None else max_block
    check_int("max_block", max_block, min_block)
    if not 0 < aspect <= 1:
        raise ValueError(f"aspect must be above 0 and at most 1, got {aspect}")
    check_int("num_attempts", num_attempts, 1)

    uniforms = _uniforms(index, num_patches + 4 * num_attempts, seed, epoch, view)
    noise, blocks = uniforms.split([num_patches, 4 * num_attempts], dim=1)
    areas, aspects, tops, lefts = blocks.unflatten(1, (4, num_attempts)).unbind(1)
    stretches = (math.log(aspect) * (aspects - 0.5)).exp()  # sqrt(height / width)
    mask = index.new_zeros((index.shape[0], num_patches), dtype=torch.bool)
    for a in range(num_attempts):
        left_over = wanted - mask.sum(dim=1)
        largest = left_over.clamp(max=max_block)
        side = (min_block + areas[:, a] * (largest - min_block).clamp(min=0)).sqrt()
        height = (side * stretches[:, a]).round().clamp(1, grid[0])
        width = (side / stretches[:, a]).round().clamp(1, grid[1])
        top, left = _place(tops[:, a], grid[0] - height), _place(lefts[:, a], grid[1] - width)
        block = _rectangle(top, left, height, width, grid)
        fits = (block & ~mask).sum(dim=1) <= largest
        mask = mask | (block & fits[:, None])
    if exact:
        left_over = wanted - mask.sum(dim=1)
        mask = mask | (_ranks(noise.masked_fill(mask, 1.0)) < left_over[:, None])
    return mask


def ibot_ratio(
    index: Tensor,
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """float32 [B]: with `probability` an even number in `ratio`, else 0 (iBOT, arXiv 2111.07832).

    Independent of the masks of the same key: `num_masked=(ibot_ratio(...) * N).long()`.
    """
    check_tensor("index", index, dim=1, dtypes=(torch.int64,))
    _check_range("ratio", ratio, 1.0)
    _check_fraction("probability", probability)
    chance, place = _keyed(index, 2, seed, epoch, view).unbind(1)
    drawn = ratio[0] + (ratio[1] - ratio[0]) * place
    return drawn.where(chance < probability, torch.zeros_like(drawn))


def ijepa_blocks(
    index: Tensor,
    grid: Grid,
    *,
    step: int,
    seed: int,
    view: int = 0,
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: int = 10,
    num_attempts: int = 4,
) -> tuple[Tensor, Tensor]:
    """I-JEPA's blocks (arXiv 2301.08243): context bool [B, N], True for what the context encoder
    sees; targets int64 [B, num_targets, T], the patches of each target block, row by row.

    The sizes are functions of (seed, step): all samples and processes of a step share them, T is
    static. The places are functions of (seed, step, view, index[b]).

    target_scale, target_aspect: area as a share of the grid, height / width; drawn evenly, rounded
        to whole patches. Targets of an image may overlap.
    context_scale: the same of the context, which has the grid's own aspect, 1 on square grids.
    min_keep: patches that a context has at least (all of a grid of fewer). A sample with fewer is
        placed anew, num_attempts times in all; if none does, the fullest of those contexts is
        filled up at random, first with patches of no target and, only if these run out, of targets.
    """
    num_patches = _check_index_and_grid(index, grid)
    check_int("step", step, 0, 2**32 - 1)
    check_int("num_targets", num_targets, 1)
    check_int("min_keep", min_keep, 1)
    check_int("num_attempts", num_attempts, 1)
    _check_range("target_scale", target_scale, 1.0)
    _check_range("target_aspect", target_aspect)
    _check_range("context_scale", context_scale, 1.0)
    min_keep = min(min_keep, num_patches)

    # On the CPU, so that no shape waits for the device.
    step_id = torch.tensor([_STEP_ID], device="cpu")
    scale, aspect, context = _keyed(step_id, 3, seed, step, 0, backend="reference")[0].tolist()
    height, width = _block_size(
        num_patches * _between(target_scale, scale), _between(target_aspect, aspect), grid
    )
    context_height, context_width = _block_size(
        num_patches * _between(context_scale, context), grid[0] / grid[1], grid
    )

    num_places = num_attempts * (1 + num_targets) * 2
    uniforms = _uniforms(index, num_places + num_patches, seed, step, view)
    places, noise = uniforms.split([num_places, num_patches], dim=1)
    y, x = places.unflatten(1, (num_attempts, 2, 1 + num_targets)).unbind(2)
    top = _place(y[:, :, 1:], grid[0] - height)  # [B, A, num_targets]
    left = _place(x[:, :, 1:], grid[1] - width)
    hidden = _rectangle(top, left, height, width, grid).any(dim=2)  # [B, A, N]
    context_top = _place(y[:, :, 0], grid[0] - context_height)
    context_left = _place(x[:, :, 0], grid[1] - context_width)
    seen = _rectangle(context_top, context_left, context_height, context_width, grid) & ~hidden

    # argmax takes the first of equals: the first attempt that keeps enough, else the fullest.
    best = seen.sum(dim=2).clamp(max=min_keep).argmax(dim=1)[:, None, None]
    seen, hidden, top, left = (t.take_along_dim(best, 1)[:, 0] for t in (seen, hidden, top, left))
    fill = _ranks((noise + hidden).masked_fill(seen, -1.0)) < min_keep
    rows = top[:, :, None] + torch.arange(height, device=index.device)
    columns = left[:, :, None] + torch.arange(width, device=index.device)
    targets = rows[:, :, :, None] * grid[1] + columns[:, :, None, :]
    return seen | fill, targets.flatten(2)


def context_ids(mask: Tensor, num_keep: int) -> Tensor:
    """int64 [B, num_keep], ascending: the first num_keep patches that are True in mask [B, N].

    A row with fewer is filled up with its first patches that are False.
    """
    check_tensor("mask", mask, dim=2, dtypes=(torch.bool,))
    check_int("num_keep", num_keep, 0, mask.shape[1])
    return F.random_masking((~mask).float(), num_keep)[0].long().sort(dim=1).values


def msn_keep(
    index: Tensor,
    grid: Grid,
    *,
    num_keep: int,
    focal: bool,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> Tensor:
    """int64 [B, num_keep], ascending: the patches that an anchor view of MSN keeps (arXiv
    2204.07141), a random set or, if `focal`, a contiguous block.

    The block is as square as the grid allows; where num_keep does not fill its last row, a row of
    the upper or lower edge is cut short at the left or right end.
    """
    num_patches = _check_index_and_grid(index, grid)
    check_int("num_keep", num_keep, 1, num_patches)
    if not focal:
        ranks = _ranks(_uniforms(index, num_patches, seed, epoch, view))
        return context_ids(ranks < num_keep, num_keep)
    width = min(max(round(math.sqrt(num_keep)), -(-num_keep // grid[0])), grid[1])
    height = -(-num_keep // width)
    y, x, flip_rows, flip_columns = _uniforms(index, 4, seed, epoch, view)[:, :, None].unbind(1)
    row = torch.arange(grid[0], device=index.device) - _place(y, grid[0] - height)
    column = torch.arange(grid[1], device=index.device) - _place(x, grid[1] - width)
    row = row.where(flip_rows < 0.5, height - 1 - row)[:, :, None]
    column = column.where(flip_columns < 0.5, width - 1 - column)[:, None, :]
    inside = (row >= 0) & (column >= 0) & (column < width) & (row * width + column < num_keep)
    return context_ids(inside.flatten(1), num_keep)


def _keyed(
    index: Tensor, num: int, seed: int, epoch: int, view: int, backend: str | None = None
) -> Tensor:
    key = {"seed": seed, "epoch": epoch, "view": view, "stream": F.STREAM_MASK}
    return F.keyed_uniform(index, num, **key, backend=backend)


def _uniforms(index: Tensor, num: int, seed: int, epoch: int, view: int) -> Tensor:  # [B, num]
    return _keyed(index, _NUM_RATIO_UNIFORMS + num, seed, epoch, view)[:, _NUM_RATIO_UNIFORMS:]


def _ranks(noise: Tensor) -> Tensor:
    """int32 [B, N]: the place of each number in its row's ascending order, ties by position."""
    return F.random_masking(noise, 0)[1]


def _place(uniform: Tensor, room: Tensor | int) -> Tensor:
    """int64 in 0 .. room. In float32, too, the product stays below room + 1: 1 - 2**-24 times a
    whole number k lies more than half a unit in the last place below k, or is exact."""
    return (uniform * (room + 1)).long()


def _rectangle(
    top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int, grid: Grid
) -> Tensor:
    """bool [..., N], True inside; top, left, height and width have shape [...]."""
    row = torch.arange(grid[0], device=top.device)
    column = torch.arange(grid[1], device=top.device)
    rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def _block_size(area: float, aspect: float, grid: Grid) -> Grid:
    """Height and width in patches, near to `area` even where the grid does not allow `aspect`."""
    height = max(round(math.sqrt(area * aspect)), math.ceil(area / grid[1]))
    height = min(max(height, 1), grid[0])
    return height, min(max(round(area / height), 1), grid[1])


def _between(bounds: tuple[float, float], uniform: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _check_index_and_grid(index: Tensor, grid: Sequence[int]) -> int:
    """The number of patches."""
    check_tensor("index", index, dim=1, dtypes=(torch.int64,))
    if not isinstance(grid, Sequence):
        raise TypeError(f"grid must be (rows, columns), got {type(grid).__name__}")
    if len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns), got {tuple(grid)}")
    check_int("grid[0]", grid[0], 1)
    check_int("grid[1]", grid[1], 1)
    return grid[0] * grid[1]


def _check_per_sample(
    name: str, value: Tensor, index: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    check_tensor(name, value, dim=1, dtypes=dtypes, device=index.device)
    check_shape(name, value, tuple(index.shape), "[B]")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _check_range(name: str, bounds: Sequence[float], maximum: float = math.inf) -> None:
    if not isinstance(bounds, Sequence):
        raise TypeError(f"{name} must be (smallest, largest), got {type(bounds).__name__}")
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= maximum or math.isinf(bounds[1]):
        upper = "< inf" if maximum == math.inf else f"<= {maximum:g}"
        raise ValueError(f"{name} must be 0 <= smallest <= largest {upper}, got {tuple(bounds)}")
