"""Which attention runs, and that all of them are the same."""

import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from fastssl import functional
from fastssl.nn import Attention, Linear, Mlp, sdpa


def fake_package(calls: list, name: str) -> types.ModuleType:
    """Has the layout [B, N, H, d] of flash-attn and xformers."""

    def attention(q, k, v):
        calls.append(name)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
            1, 2
        )

    module = types.ModuleType(name)
    module.flash_attn_func = module.memory_efficient_attention = attention
    return module


@pytest.mark.parametrize("units", [{}, {"unit_size": 8}, {"unit_size": 8, "q_stride": 2}])
@pytest.mark.parametrize("named", ["torch", "flash_attn", "xformers"])
def test_named_implementations_are_used_and_agree(named, units, monkeypatch):
    qkv = torch.randn(2, 16, 36)
    expected = sdpa.self_attention(qkv, 3, **units)
    calls = []
    for name in ("flash_attn", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, fake_package(calls, name.split(".")[0]))
    monkeypatch.setenv("FASTSSL_ATTENTION", named)
    torch.testing.assert_close(sdpa.self_attention(qkv, 3, **units), expected)
    assert calls == ([] if named == "torch" else [named])


def test_a_named_implementation_never_falls_back(monkeypatch):
    qkv = torch.randn(1, 4, 12)
    monkeypatch.setenv("FASTSSL_ATTENTION", "flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="FASTSSL_ATTENTION=flash_attn cannot be used"):
        sdpa.self_attention(qkv, 2)
    monkeypatch.setenv("FASTSSL_ATTENTION", "flsh")
    with pytest.raises(ValueError, match="must be one of torch, flash_attn, xformers, got 'flsh'"):
        sdpa.self_attention(qkv, 2)


@pytest.mark.parametrize("tokens", [256, 257])
def test_long_and_short_sequences(tokens):
    """The kernels serve 256 keys, torch what is longer."""
    qkv = torch.randn(1, tokens, 24, requires_grad=True)
    grad = torch.randn(1, tokens, 8)
    q, k, v = qkv.view(1, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    actual = sdpa.self_attention(qkv, 2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, qkv, grad)[0] for out in (actual, expected))
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "training", "chosen"),
    [
        ("tiles", torch.bfloat16, True, "kernels"),
        ("tiles", torch.bfloat16, False, "kernels"),
        ("tiles", torch.float32, True, "torch"),
        ("dots", torch.bfloat16, True, "kernels"),
        ("dots", torch.bfloat16, False, "kernels"),
        ("dots", torch.float16, True, "scores"),
        ("dots", torch.float32, True, "kernels"),
        ("avx512", torch.bfloat16, True, "scores"),
        ("avx512", torch.bfloat16, False, "scores"),
        ("avx512", torch.float16, False, "torch"),
        ("avx512", torch.float32, True, "kernels"),
        ("avx512", torch.float32, False, "kernels"),
        ("other", torch.bfloat16, True, "scores"),
        ("other", torch.bfloat16, False, "torch"),
        ("other", torch.float32, True, "torch"),
    ],
)
def test_what_a_processor_is_given(kind, dtype, training, chosen, monkeypatch):
    monkeypatch.setattr(sdpa, "_cpu_kind", lambda: kind)
    monkeypatch.setattr(sdpa, "_has_bf16_products", lambda: True)
    calls = []
    kernels, fused = functional.mask_unit_attention, F.scaled_dot_product_attention

    def counted(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(functional, "mask_unit_attention", counted("kernels", kernels))
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted("torch", fused))
    qkv = torch.randn(2, 8, 36).to(dtype).requires_grad_(training)
    out = sdpa.self_attention(qkv, 3)
    assert (calls or ["scores"]) == [chosen]
    q, k, v = qkv.view(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4).double()
    expected = fused(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "training", "width", "tokens", "chosen"),
    [
        (torch.bfloat16, False, 64, 64, True),
        (torch.bfloat16, False, 64, 65, False),
        (torch.bfloat16, True, 72, 96, True),
        (torch.float16, True, 72, 97, False),
        (torch.bfloat16, True, 32, 256, True),
        (torch.bfloat16, True, 32, 257, False),
        (torch.float32, True, 32, 65, False),
    ],
)
def test_what_a_gpu_is_given(dtype, training, width, tokens, chosen):
    with FakeTensorMode():
        qkv = torch.empty(
            2, tokens, 3 * 2 * width, device="cuda", dtype=dtype, requires_grad=training
        )
        assert sdpa._prefers_kernels(qkv, 2, tokens, 1) == chosen


def test_replaced_and_hooked_layers_are_called():
    """Adapters and hooks on fc1 see what passes through it."""
    mlp, x = Mlp(6, 12), torch.randn(2, 3, 6)
    expected = mlp(x)
    seen = []
    handle = mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2].shape))
    torch.testing.assert_close(mlp(x), expected)
    assert seen == [(2, 3, 12)]
    handle.remove()

    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(6, 12)
    doubled.load_state_dict(mlp.fc1.state_dict())
    mlp.fc1 = doubled
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(2 * F.linear(x, *doubled.parameters()))))


@pytest.mark.parametrize("kind", [Attention, Mlp])
def test_layers_under_autocast_give_gradients_in_float32(kind):
    torch.manual_seed(0)
    layer = kind(16, 4) if kind is Attention else kind(16, 32)
    x = torch.randn(3, 5, 16, requires_grad=True)
    grad = torch.randn(3, 5, 16)

    def run():
        layer.zero_grad()
        out = layer(x)
        found = torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype))
        return [out, *found]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run()
    assert mixed[0].dtype == torch.bfloat16
    for a, b in zip(mixed[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_linear_is_a_linear_layer():
    layer, x = Linear(4, 3), torch.randn(2, 4)
    assert isinstance(layer, nn.Linear)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
