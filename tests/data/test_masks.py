"""Masks: exact counts, shapes and spread, and that a row is a function of its keys alone."""

import math

import pytest
import torch

from fastssl import functional as F
from fastssl.data.masks import (
    block_mask,
    context_ids,
    ibot_ratio,
    ijepa_blocks,
    msn_keep,
    random_mask,
)

INDEX = torch.cat([torch.arange(500), torch.tensor([2**32 + 3, 2**63 - 2])])
SQUARE = (14, 14)
GRIDS = [SQUARE, (5, 9), (9, 4), (1, 7), (7, 1), (2, 3), (1, 1)]
# Each gives one tensor [B, ...]; grid and keys can be replaced.
GENERATORS = {
    "random": lambda index, **key: random_mask(index, SQUARE, ratio=0.6, **key),
    "block": lambda index, **key: block_mask(index, SQUARE, num_masked=75, **key),
    "ratio": lambda index, **key: ibot_ratio(index, probability=1.0, **key),
    "context": lambda index, epoch=0, **key: ijepa_blocks(index, SQUARE, step=epoch, **key)[0],
    "targets": lambda index, **key: ijepa_blocks(index, SQUARE, step=0, **key)[1],
    "drop": lambda index, **key: msn_keep(index, SQUARE, num_keep=50, focal=False, **key),
    "focal": lambda index, **key: msn_keep(index, SQUARE, num_keep=50, focal=True, **key),
}


def borders(mask, grid):
    """[B]: neighbouring pairs of patches of which one is masked and one is not."""
    m = mask.unflatten(1, grid)
    down, right = m[:, 1:] ^ m[:, :-1], m[:, :, 1:] ^ m[:, :, :-1]
    return down.sum((1, 2)) + right.sum((1, 2))


def extents(ids, grid):
    """Rows and columns that the patches ids [..., K] span."""
    row, column = ids // grid[1], ids % grid[1]
    return row.amax(-1) - row.amin(-1) + 1, column.amax(-1) - column.amin(-1) + 1


def as_mask(ids, grid):
    mask = torch.zeros(ids.shape[0], math.prod(grid), dtype=torch.bool)
    return mask.scatter(1, ids.flatten(1), True)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_row_depends_on_its_own_keys_only(name):
    generate = GENERATORS[name]
    rows = generate(INDEX, seed=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    picked = torch.tensor([501, 7, 7, 300])
    assert torch.equal(generate(INDEX[picked], seed=3), rows[picked])
    assert torch.equal(generate(INDEX[:1], seed=3), rows[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(INDEX[:0], seed=3).shape == (0, *rows.shape[1:])


@pytest.mark.parametrize("name", GENERATORS)
def test_every_key_matters(name):
    generate = GENERATORS[name]
    index = INDEX[:100]
    keys = [{"seed": 3}, {"seed": 4}, {"seed": 3, "view": 1}]
    if name != "targets":  # of which another step changes the sizes, too
        keys.append({"seed": 3, "epoch": 1})
    rows = [generate(index, **key) for key in keys] + [generate(index + 1000, seed=3)]
    for a in range(len(rows)):
        for b in range(a):
            if rows[a].shape == rows[b].shape:
                same = (rows[a] == rows[b]).reshape(100, -1).all(1)
                assert same.float().mean() < 0.1
    assert len({tuple(row) for row in rows[0].reshape(100, -1).tolist()}) > 30


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.75, 1.0])
def test_random_mask_counts(grid, ratio):
    mask = random_mask(INDEX, grid, ratio=ratio, seed=0)
    assert mask.dtype == torch.bool and mask.shape == (len(INDEX), math.prod(grid))
    assert (mask.sum(1) == int(math.prod(grid) * ratio)).all()


def test_random_mask_is_even_and_takes_a_ratio_per_sample():
    share = random_mask(INDEX, SQUARE, ratio=0.75, seed=0).float().mean(0)
    # Five standard deviations of a mean of 502.
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / len(INDEX))
    ratio = torch.linspace(-0.1, 1.1, len(INDEX))
    mask = random_mask(INDEX, SQUARE, ratio=ratio, seed=0)
    assert torch.equal(mask.sum(1), (ratio * 196).long().clamp(0, 196))
    # The same numbers decide, whatever the ratio.
    whole = random_mask(INDEX, SQUARE, ratio=0.5, seed=0)
    assert not (mask & ~whole)[ratio < 0.5].any() and not (whole & ~mask)[ratio > 0.51].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_block_mask_counts(grid):
    num_patches = math.prod(grid)
    for num_masked in {0, 1, num_patches * 2 // 5, num_patches}:
        mask = block_mask(INDEX, grid, num_masked=num_masked, seed=0)
        assert mask.dtype == torch.bool and mask.shape == (len(INDEX), num_patches)
        assert (mask.sum(1) == num_masked).all()
        atmost = block_mask(INDEX, grid, num_masked=num_masked, seed=0, exact=False)
        assert (atmost.sum(1) <= num_masked).all()
        assert not (atmost & ~mask).any()
    wanted = torch.arange(len(INDEX)) - 20
    mask = block_mask(INDEX, grid, num_masked=wanted, seed=0)
    assert torch.equal(mask.sum(1), wanted.clamp(0, num_patches))


def test_a_row_of_a_count_per_sample_is_that_of_the_count_alone():
    wanted = torch.arange(len(INDEX)) % 197
    mask = block_mask(INDEX, SQUARE, num_masked=wanted, seed=0)
    for row in (40, 100, 150):
        alone = block_mask(INDEX[row : row + 1], SQUARE, num_masked=int(wanted[row]), seed=0)
        assert torch.equal(mask[row : row + 1], alone)


def test_block_masks_are_clustered_and_reach_every_patch():
    mask = block_mask(INDEX, SQUARE, num_masked=75, min_block=16, seed=0)
    scattered = random_mask(INDEX, SQUARE, ratio=75.5 / 196, seed=0)
    assert (scattered.sum(1) == 75).all()
    assert borders(mask, SQUARE).float().mean() < 0.35 * borders(scattered, SQUARE).float().mean()
    share = mask.float().mean(0)
    assert share.min() > 0.02 and share.max() < 0.75
    # Few of the patches are not from blocks.
    blocks = block_mask(INDEX, SQUARE, num_masked=75, min_block=16, seed=0, exact=False)
    assert blocks.sum(1).float().mean() > 0.97 * 75


def test_one_block_has_the_area_and_aspect_asked_for():
    grid, area, aspect = (60, 70), 100, 0.3
    key = {"num_masked": 130, "min_block": area, "max_block": area, "aspect": aspect, "seed": 1}
    mask = block_mask(INDEX, grid, **key, exact=False, num_attempts=1)
    mask = mask[mask.any(1)].unflatten(1, grid)
    assert len(mask) > 200
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)
    assert torch.equal(height * width, mask.sum((1, 2)))  # one filled rectangle
    assert mask.sum((1, 2)).max() <= area and (height * width > 0.85 * area).all()
    side = math.sqrt(area)
    assert height.min() == round(side * math.sqrt(aspect)) == width.min()
    assert abs(height.max() - side / math.sqrt(aspect)) <= 1
    assert abs((height > width).float().mean() - (height < width).float().mean()) < 0.15


def test_block_areas_are_even_up_to_what_is_left():
    mask = block_mask(INDEX, (60, 70), num_masked=400, seed=2, exact=False, num_attempts=1)
    area = mask.sum(1)[mask.any(1)].float()
    assert abs(area.mean() - 202) < 5 * 396 / math.sqrt(12 * len(area))
    assert area.min() < 30 and 370 < area.max() <= 400


def test_ibot_ratio():
    index = torch.arange(4000)
    ratio = ibot_ratio(index, seed=0)
    drawn = ratio[ratio > 0]
    assert ratio.dtype == torch.float32 and ratio.shape == (4000,)
    assert abs(len(drawn) / 4000 - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert 0.1 <= drawn.min() < 0.11 and 0.49 < drawn.max() <= 0.5
    assert abs(drawn.mean() - 0.3) < 5 * 0.4 / math.sqrt(12 * len(drawn))
    assert (ibot_ratio(index, probability=0.0, seed=0) == 0).all()
    assert (ibot_ratio(index, ratio=(0.3, 0.3), probability=1.0, seed=0) == 0.3).all()


def test_the_ratio_says_nothing_of_the_mask():
    index = torch.arange(4000)
    ratio = ibot_ratio(index, seed=0, probability=1.0)
    mask = random_mask(index, (2, 4), ratio=0.5, seed=0).float()
    both = torch.cat([ratio[:, None], mask], dim=1).T.corrcoef()[0, 1:]
    assert both.abs().max() < 5 / math.sqrt(4000)


def test_ijepa_targets_are_rectangles_of_one_size_a_step():
    sizes = set()
    for step in range(60):
        _, targets = ijepa_blocks(INDEX[:20], SQUARE, step=step, seed=0)
        height, width = extents(targets, SQUARE)
        assert targets.dtype == torch.int64 and targets.shape[:2] == (20, 4)
        assert (targets.diff(dim=-1) > 0).all() and targets.min() >= 0 and targets.max() < 196
        assert (height == height[0, 0]).all() and (width == width[0, 0]).all()
        assert (height * width == targets.shape[2]).all()
        sizes.add((int(height[0, 0]), int(width[0, 0])))
    assert len(sizes) > 5
    for height, width in sizes:
        # Half a patch more or less on each side is rounding.
        assert 0.15 * 196 - height / 2 <= height * width <= 0.2 * 196 + height / 2
        assert (height - 0.5) / (width + 0.5) <= 1.5 and (height + 0.5) / (width - 0.5) >= 0.75
    assert min(h / w for h, w in sizes) < 0.9 and max(h / w for h, w in sizes) > 1.3


def test_ijepa_places_are_even_and_differ_between_targets():
    _, targets = ijepa_blocks(INDEX, SQUARE, step=0, seed=0)
    height, width = (int(extent[0, 0]) for extent in extents(targets, SQUARE))
    first = targets[:, :, 0]
    rows, columns = first // 14, first % 14
    for place, room in ((rows, 14 - height), (columns, 14 - width)):
        count = place.flatten().bincount(minlength=room + 1)
        expected = place.numel() / (room + 1)
        assert len(count) == room + 1 and (count - expected).abs().max() < 5 * math.sqrt(expected)
    assert (first[:, 0] == first[:, 1]).float().mean() < 0.05
    places = torch.cat([rows, columns], dim=1).T.float().corrcoef() - torch.eye(8)
    assert places.abs().max() < 5 / math.sqrt(len(INDEX))


def test_ijepa_context_is_one_block_without_the_targets():
    shares = set()
    for step in range(40):
        context, targets = ijepa_blocks(INDEX, SQUARE, step=step, seed=0)
        assert context.dtype == torch.bool and (context.sum(1) >= 10).all()
        hidden = as_mask(targets, SQUARE)
        assert not (context & hidden).any()
        # Where the targets leave its edges free the block is seen whole: it is what spans most.
        rows = context.unflatten(1, SQUARE).any(2).sum(1).max()
        columns = context.unflatten(1, SQUARE).any(1).sum(1).max()
        assert rows * columns >= 0.85 * 196 - 7 and abs(rows - columns) <= 1
        shares.add(int(rows * columns))
    assert len(shares) > 1


def test_ijepa_places_anew_before_it_fills():
    key = {"step": 0, "seed": 0, "target_scale": (0.3, 0.3), "min_keep": 45}
    once, _ = ijepa_blocks(INDEX, SQUARE, num_attempts=1, **key)
    often, targets = ijepa_blocks(INDEX, SQUARE, num_attempts=6, **key)
    assert (once.sum(1) >= 45).all() and (often.sum(1) >= 45).all()
    enough = once.sum(1) > 45
    assert 0.1 < enough.float().mean() < 0.95
    assert torch.equal(often[enough], once[enough])
    assert (often.sum(1) > 45).float().mean() > enough.float().mean() + 0.04
    assert (often & as_mask(targets, SQUARE)).any(1).float().mean() < 0.01


def test_ijepa_overlaps_only_when_nothing_else_is_left():
    context, targets = ijepa_blocks(
        INDEX, (6, 6), step=0, seed=0, target_scale=(0.5, 0.5), min_keep=20, num_attempts=1
    )
    hidden = as_mask(targets, (6, 6))
    overlap = (context & hidden).sum(1)
    assert torch.equal(overlap, (20 - (~hidden).sum(1)).clamp(min=0))
    assert overlap.max() > 0 and (context.sum(1) >= 20).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_ijepa_on_every_grid(grid):
    num_patches = math.prod(grid)
    for step in range(5):
        context, targets = ijepa_blocks(INDEX, grid, step=step, seed=0, min_keep=2)
        assert context.shape == (len(INDEX), num_patches)
        assert (context.sum(1) >= min(2, num_patches)).all()
        height, width = extents(targets, grid)
        assert (height * width == targets.shape[2]).all()
        assert targets.min() == 0 and targets.max() == num_patches - 1
        area = targets.shape[2]
        assert 0.15 * num_patches - 2.5 <= area <= max(0.2 * num_patches + 2.5, 1)


def test_context_ids():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    assert context_ids(mask, 2).tolist() == [[1, 2], [0, 1]]
    assert context_ids(mask, 3).tolist() == [[1, 2, 4], [0, 1, 2]]
    assert context_ids(mask, 0).shape == (2, 0) and context_ids(mask, 2).dtype == torch.int64
    context, _ = ijepa_blocks(INDEX, SQUARE, step=0, seed=0)
    ids = context_ids(context, 10)
    assert context.gather(1, ids).all()
    for row in (0, 99):
        assert ids[row].tolist() == context[row].nonzero()[:10, 0].tolist()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("focal", [False, True])
def test_msn_keep_counts_and_reaches_every_patch(grid, focal):
    num_patches = math.prod(grid)
    for num_keep in sorted({1, num_patches // 3, num_patches // 2, num_patches} - {0}):
        ids = msn_keep(INDEX, grid, num_keep=num_keep, focal=focal, seed=0)
        assert ids.dtype == torch.int64 and ids.shape == (len(INDEX), num_keep)
        assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < num_patches
        if num_keep > 1 or num_patches < 50:
            assert len(ids.unique()) == num_patches


@pytest.mark.parametrize("num_keep", [1, 2, 3, 7, 36, 50, 61, 100, 183])
def test_focal_is_a_block(num_keep):
    ids = msn_keep(INDEX, SQUARE, num_keep=num_keep, focal=True, seed=0)
    height, width = extents(ids, SQUARE)
    assert (height == height[0]).all() and (width == width[0]).all()
    assert abs(height[0] - width[0]) <= 1
    assert num_keep <= height[0] * width[0] < num_keep + width[0]
    # Every row of the block is unbroken, and all but one at its edge are whole.
    rows = as_mask(ids, SQUARE).unflatten(1, SQUARE)
    assert ((rows[:, :, 1:] ^ rows[:, :, :-1]).sum(2) <= 2).all()
    assert ((rows.sum(2) == width[0]).sum(1) >= height[0] - 1).all()


def test_focal_is_cut_short_at_any_corner():
    ids = msn_keep(INDEX, (2, 3), num_keep=5, focal=True, seed=0)
    missing = (~as_mask(ids, (2, 3))).sum(0)
    assert missing[1] == missing[4] == 0
    expected = len(INDEX) / 4
    assert (missing[[0, 2, 3, 5]] - expected).abs().max() < 5 * math.sqrt(expected)


def test_drop_is_even():
    ids = msn_keep(INDEX, SQUARE, num_keep=49, focal=False, seed=0)
    share = as_mask(ids, SQUARE).float().mean(0)
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / len(INDEX))


def test_the_largest_number_stays_inside(monkeypatch):
    """The products that choose a place must not round up to the next one."""

    def largest(index, num, **_):
        return torch.full((len(index), num), 1 - 2**-24)

    monkeypatch.setattr(F, "keyed_uniform", largest)
    for size in range(1, 70):
        grid = (size, size + 1)
        ids = msn_keep(INDEX[:1], grid, num_keep=1, focal=True, seed=0)
        _, targets = ijepa_blocks(INDEX[:1], grid, step=0, seed=0)
        assert ids.max() == targets.max() == size * (size + 1) - 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_mask(INDEX.int(), SQUARE, ratio=0.5, seed=0), TypeError, "index must be"),
        (lambda: random_mask(INDEX, (3,), ratio=0.5, seed=0), ValueError, r"grid must be .*\(3,\)"),
        (lambda: random_mask(INDEX, 14, ratio=0.5, seed=0), TypeError, "grid must be .* got int"),
        (lambda: random_mask(INDEX, (3, 0), ratio=0.5, seed=0), ValueError, r"grid\[1\] must be"),
        (lambda: random_mask(INDEX, SQUARE, ratio=1.5, seed=0), ValueError, "ratio .* got 1.5"),
        (
            lambda: random_mask(INDEX, SQUARE, ratio=torch.ones(3), seed=0),
            ValueError,
            r"ratio must have shape \[B\]",
        ),
        (lambda: block_mask(INDEX, (2, 2), num_masked=5, seed=0), ValueError, "at most 4, got 5"),
        (
            lambda: block_mask(INDEX, SQUARE, num_masked=torch.ones(502), seed=0),
            TypeError,
            "num_masked must be int64, got float32",
        ),
        (
            lambda: block_mask(INDEX, SQUARE, num_masked=9, max_block=3, seed=0),
            ValueError,
            "max_block must be at least 4, got 3",
        ),
        (
            lambda: block_mask(INDEX, SQUARE, num_masked=9, aspect=2.0, seed=0),
            ValueError,
            "aspect must be above 0 and at most 1, got 2.0",
        ),
        (lambda: ibot_ratio(INDEX, ratio=(0.5, 0.1), seed=0), ValueError, "ratio must be 0 <="),
        (lambda: ibot_ratio(INDEX, ratio=0.5, seed=0), TypeError, "ratio must be .* got float"),
        (lambda: ibot_ratio(INDEX, probability=-1, seed=0), ValueError, "probability must be in"),
        (lambda: ijepa_blocks(INDEX, SQUARE, step=-1, seed=0), ValueError, "step must be at least"),
        (
            lambda: ijepa_blocks(INDEX, SQUARE, step=0, seed=0, target_scale=(0.5, 1.5)),
            ValueError,
            "target_scale must be 0 <= smallest <= largest <= 1",
        ),
        (
            lambda: ijepa_blocks(INDEX, SQUARE, step=0, seed=0, target_aspect=(1.0, math.inf)),
            ValueError,
            "target_aspect must be 0 <= smallest <= largest < inf",
        ),
        (
            lambda: ijepa_blocks(INDEX, SQUARE, step=0, seed=0, min_keep=0),
            ValueError,
            "min_keep must be at least 1, got 0",
        ),
        (lambda: context_ids(torch.ones(2, 3), 2), TypeError, "mask must be bool, got float32"),
        (lambda: context_ids(torch.ones(2, 3).bool(), 4), ValueError, "num_keep .* got 4"),
        (
            lambda: msn_keep(INDEX, (2, 2), num_keep=5, focal=True, seed=0),
            ValueError,
            "num_keep must be at least 1 and at most 4, got 5",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
