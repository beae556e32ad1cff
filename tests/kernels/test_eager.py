"""Ops called without the dispatcher's detour: what they refuse."""

import pytest
import torch

from fastssl import functional as F


def calls() -> dict:
    weight = torch.randn(8, 8)
    vector = torch.randn(8)
    return {
        "mask_unit_attention": lambda x: F.mask_unit_attention(
            x.repeat(1, 1, 3), num_heads=2, unit_size=4, backend="cpp"
        ),
        "mask_unit_pool": lambda x: F.mask_unit_pool(x, unit_size=4, q_stride=2, backend="cpp"),
        "gelu_mlp": lambda x: F.gelu_mlp(x, weight, vector, weight, vector, backend="cpp"),
        "add_layer_norm": lambda x: F.add_layer_norm(x, None, vector, vector, backend="cpp")[1],
    }


@pytest.mark.parametrize("name", calls())
def test_second_derivatives_are_refused_and_first_ones_are_not(name):
    x = torch.randn(2, 8, 8, requires_grad=True)
    y = calls()[name](x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="first derivatives only; backend='reference'"):
        torch.autograd.grad(grad.square().sum(), x)
