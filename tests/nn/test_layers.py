"""Attention, Mlp, DropPath, LayerScale and Block against their formulas."""

import pytest
import torch
from torch import nn

from fastssl.nn import Attention, Block, DropPath, LayerScale, Mlp, SwiGLU


def test_attention_is_the_formula():
    attention = Attention(12, num_heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    # The official order of the fused projection: q of all heads, then k, then v.
    q, k, v = (
        t.reshape(2, 5, 3, 4) for t in attention.qkv(x).split(12, dim=-1)
    )  # [B, N, H, D/H] each
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4**0.5
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).reshape(2, 5, 12)
    torch.testing.assert_close(attention(x), attention.proj(out))
    assert sorted(attention.state_dict()) == ["proj.bias", "proj.weight", "qkv.bias", "qkv.weight"]


def test_attention_options():
    assert Attention(8, 2, qkv_bias=False).qkv.bias is None
    with pytest.raises(ValueError, match="dim must be divisible by num_heads=3, got 8"):
        Attention(8, 3)


def test_mlp_is_the_formula():
    mlp = Mlp(4, 6, 3)
    x = torch.randn(2, 5, 4)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert Mlp(4).fc2.weight.shape == (4, 4)
    assert isinstance(Mlp(4, act_layer=nn.ReLU).act, nn.ReLU)


@pytest.mark.parametrize("hidden, kept", [(24, 16), (30, 24), (6144, 4096)])
def test_swiglu_is_the_formula(hidden, kept):
    layer = SwiGLU(4, hidden, 3)
    x = torch.randn(2, 5, 4)
    a, b = (x @ layer.w12.weight.T + layer.w12.bias).split(kept, dim=-1)
    expected = (a * a.sigmoid() * b) @ layer.w3.weight.T + layer.w3.bias
    torch.testing.assert_close(layer(x), expected)
    assert SwiGLU(4).w3.weight.shape == (4, 8)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    x = torch.ones(4000, 3, 2, requires_grad=True)
    out = DropPath(0.25)(x)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand(-1, 6))
    kept = per_sample[:, 0] != 0
    torch.testing.assert_close(per_sample[kept], torch.full_like(per_sample[kept], 1 / 0.75))
    assert abs(kept.float().mean().item() - 0.75) < 0.03  # 4 standard deviations
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_drop_path_rests_in_evaluation_and_at_zero():
    x = torch.randn(8, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match="drop_prob must be in"):
            DropPath(bad)


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_block_is_the_formula(init_values):
    block = Block(8, num_heads=2, mlp_ratio=1.5, init_values=init_values)
    x = torch.randn(2, 5, 8)
    scale = init_values or 1.0
    expected = x + scale * block.attn(block.norm1(x))
    expected = expected + scale * block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)
    assert block.mlp.fc1.out_features == 12
    assert ("ls1.gamma" in block.state_dict()) == (init_values is not None)


def test_block_skips_dropped_branches():
    block = Block(8, num_heads=2, drop_path=0.5)
    x = torch.randn(64, 3, 8)
    untouched = (block(x) == x).flatten(1).all(1)
    assert 0.1 < untouched.float().mean() < 0.45  # both branches dropped: a quarter


def test_layer_scale_resets():
    layer = LayerScale(3, 0.1)
    nn.init.zeros_(layer.gamma)
    layer.reset_parameters()
    assert torch.equal(layer(torch.ones(2, 3)), torch.full((2, 3), 0.1))


def test_a_replaced_layer_scale_is_called():
    torch.manual_seed(0)
    block, x = Block(8, num_heads=2, init_values=0.3), torch.randn(2, 5, 8)
    expected = x + 10 * block.attn(block.norm1(x))
    expected = expected + block.ls2(block.mlp(block.norm2(expected)))

    class Tenfold(nn.Module):
        def forward(self, x):
            return 10 * x

    block.ls1 = Tenfold()
    torch.testing.assert_close(block(x), expected)
