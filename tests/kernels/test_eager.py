"""Ops called without the dispatcher's detour: what they refuse, and the GPU that they run on."""

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from fastssl import functional as F
from fastssl.kernels.common import eager

OPS_WITH_BODIES = {"linear", "gelu_mlp", "mask_unit_attention", "masked_gather", "barlow_twins"}


def calls(backend: str = "cpp", device: str = "cpu") -> dict:
    torch.manual_seed(0)
    weight, vector = torch.randn(8, 8).to(device), torch.randn(8).to(device)
    return {
        "mask_unit_attention": lambda x: F.mask_unit_attention(
            x.repeat(1, 1, 3), num_heads=2, unit_size=4, backend=backend
        ),
        "mask_unit_pool": lambda x: F.mask_unit_pool(x, unit_size=4, q_stride=2, backend=backend),
        "gelu_mlp": lambda x: F.gelu_mlp(x, weight, vector, weight, vector, backend=backend),
        "add_layer_norm": lambda x: F.add_layer_norm(x, None, vector, vector, backend=backend)[1],
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


class OnSecondGPU(torch.Tensor):
    """Says that it is on a GPU which is not the current one."""

    @property
    def device(self):
        return torch.device("cuda", 1)


@pytest.mark.parametrize("arguments", [(None, "x"), (2, ["x"]), ("x",)])
def test_a_body_runs_with_its_tensors_gpu_as_the_current_one(monkeypatch, arguments):
    current, seen = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    body = eager._on_their_device(lambda *args: seen.append(current[-1]))

    def with_tensors(tensor):
        return [tensor if x == "x" else [tensor] if x == ["x"] else x for x in arguments]

    body(*with_tensors(torch.zeros(1).as_subclass(OnSecondGPU)))
    body(*with_tensors(torch.zeros(1)))
    assert seen == [1, 0] and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", calls())
def test_tensors_on_another_gpu_than_the_current_one(name):
    x = torch.randn(2, 8, 8)
    assert torch.cuda.current_device() == 0
    actual = calls("triton", "cuda:1")[name](x.to("cuda:1"))
    torch.testing.assert_close(actual.cpu(), calls()[name](x), rtol=1e-4, atol=1e-4)


def test_no_op_is_registered_without_the_guard():
    ours = {name: op for name, op in OPDEFS.items() if name.startswith("fastssl::")}
    assert {name.removeprefix("fastssl::") for name in ours} >= OPS_WITH_BODIES
    for name, op in ours.items():
        assert op.body.__code__ is eager._on_their_device(print).__code__, name
