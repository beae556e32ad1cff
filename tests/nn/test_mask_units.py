"""The order of tokens in mask units, and attention in it."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from fastssl.functional import mask_unit_pool, random_masking
from fastssl.nn import sdpa
from fastssl.nn.mask_units import HieraBlock, MaskUnitAttention, UnitLayout

LAYOUTS = [
    UnitLayout((8, 8), (2, 2), 3),
    UnitLayout((8, 8), (2, 2), 2),
    UnitLayout((1, 8, 8), (1, 2, 2), 3),
    UnitLayout((4, 6, 12), (2, 1, 3), 1),
    UnitLayout((3, 5), (2, 2), 0),
]


def test_order_of_the_released_unit():
    # Position = 16 * s1 + 4 * s2 + s3, with s1 the member of a first 2 x 2 group, and so on.
    expected = []
    for s1, s2, s3 in itertools.product(range(4), repeat=3):
        row = s1 // 2 + 2 * (s2 // 2) + 4 * (s3 // 2)
        column = s1 % 2 + 2 * (s2 % 2) + 4 * (s3 % 2)
        expected.append(8 * row + column)
    assert UnitLayout((8, 8), (2, 2), 3).order == tuple(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unroll_puts_units_one_behind_the_other(layout):
    grid = tuple(n * (2 + i) for i, n in enumerate(layout.shape))
    x = torch.randn(2, *grid, 3)
    tokens = layout.unroll(x)
    assert torch.equal(layout.reroll(tokens, grid), x)
    units = itertools.product(*(range(g // n) for g, n in zip(grid, layout.shape, strict=True)))
    for i, unit in enumerate(units):
        places = (slice(u * n, u * n + n) for u, n in zip(unit, layout.shape, strict=True))
        local = x[(slice(None), *places)].flatten(1, -2)[:, list(layout.order)]
        assert torch.equal(tokens.unflatten(1, (-1, layout.num_tokens))[:, i], local)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_pooling_is_a_maximum_over_neighbours(layout):
    x = torch.randn(2, *(2 * n for n in layout.shape), 3)
    tokens, pool = layout.unroll(x), F.max_pool3d if x.dim() == 5 else F.max_pool2d
    while layout.num_pools:
        stride, layout = layout.q_stride, layout.pooled()
        members = math.prod(stride)
        unit_size = members * layout.num_tokens
        tokens = mask_unit_pool(tokens, unit_size=unit_size, q_stride=members)
        x = pool(x.movedim(-1, 1), stride).movedim(1, -1)
        assert torch.equal(layout.reroll(tokens, x.shape[1:-1]), x)
    assert layout.shape == layout.final_shape


def test_layout_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"divisible by q_stride \*\* 3 = \(8, 8\), got \(8, 12\)"):
        UnitLayout((8, 12), (2, 2), 3)
    with pytest.raises(ValueError, match=r"same length, got \(8, 8\) and \(1, 2, 2\)"):
        UnitLayout((8, 8), (1, 2, 2), 3)


def test_attention_of_one_unit_does_not_see_another():
    attention = MaskUnitAttention(6, 12, 3, q_stride=4, window_size=4, use_mask_unit_attn=True)
    x = torch.randn(2, 32, 6)
    out = attention(x)
    assert out.shape == (2, 8, 12)
    for unit in range(2):
        alone = attention(x[:, 16 * unit : 16 * unit + 16])
        torch.testing.assert_close(out[:, 4 * unit : 4 * unit + 4], alone)
    everywhere = MaskUnitAttention(6, 12, 3, q_stride=4, window_size=4)
    everywhere.load_state_dict(attention.state_dict())
    assert (everywhere(x) - out).abs().max() > 1e-3


@pytest.mark.parametrize("global_attention", [False, True])
def test_attention_equals_its_formula(global_attention):
    attention = MaskUnitAttention(6, 8, 2, 4, 2, use_mask_unit_attn=not global_attention)
    x = torch.randn(3, 16, 6)
    windows = x if global_attention else x.unflatten(1, (2, 8)).flatten(0, 1)
    q, k, v = attention.qkv(windows).chunk(3, dim=-1)
    q = q.unflatten(1, (-1, 4, 2)).amax(2).flatten(1, 2)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 2.0
        heads.append(scores.softmax(-1) @ v[..., head])
    expected = attention.proj(torch.cat(heads, -1)).reshape(3, 4, 8)
    torch.testing.assert_close(attention(x), expected)


def test_attention_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="dim_out must be divisible by heads=3, got 8"):
        MaskUnitAttention(8, 8, 3)
    with pytest.raises(ValueError, match=r"window_size must be positive .*, got 0"):
        MaskUnitAttention(8, 8, 2, q_stride=4)


@pytest.mark.parametrize("shape", [(5, 2, 16, 64, 24), (2, 3, 49, 49, 32), (1, 1, 1, 1, 8)])
def test_half_precision_training_on_a_cpu(shape):
    """Values and gradients are as close to float64's as those of torch's fused kernel."""
    batch, heads, queries, keys, dim = shape
    sizes = [(batch, heads, n, dim) for n in (queries, keys, keys)]
    qkv = [torch.randn(size, dtype=torch.bfloat16) for size in sizes]
    weight = torch.randn(sizes[0], dtype=torch.bfloat16)

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in qkv]
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, weight.to(dtype))

    exact = run(F.scaled_dot_product_attention, torch.float64)
    fused = run(F.scaled_dot_product_attention, torch.bfloat16)
    for a, f, e in zip(run(sdpa.attend, torch.bfloat16), fused, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - e).abs().max() <= 2 * (f - e).abs().max() + 0.01


def test_more_windows_than_a_grid_dimension(monkeypatch):
    q, k, v = torch.randn(3, 7, 2, 4, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(sdpa, "MAX_BATCH", 3)
    torch.testing.assert_close(sdpa.attend(q, k, v), expected)


@pytest.mark.parametrize("drop_path", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("in_units", [False, True])
@pytest.mark.parametrize("q_stride", [1, 4])
def test_wanted_tokens_are_those_of_the_whole_block(q_stride, in_units, drop_path):
    kwargs = {"q_stride": q_stride, "window_size": 4, "use_mask_unit_attn": in_units}
    block = HieraBlock(12, 12 * q_stride, 2, drop_path=drop_path, **kwargs)
    x = torch.randn(4, 32, 12, requires_grad=True)
    ids, ids_restore, _ = random_masking(torch.rand(4, 32 // q_stride), 3)
    parameters = [x, *block.parameters()]
    seed = torch.randint(1000, ()).item()
    torch.manual_seed(seed)
    whole = block(x)
    expected = whole.gather(1, ids.long().unsqueeze(2).expand(-1, -1, whole.shape[2]))
    torch.manual_seed(seed)
    y = block(x, ids, ids_restore if in_units else None)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, parameters, dy),
        torch.autograd.grad(expected, parameters, dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
