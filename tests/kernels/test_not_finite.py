"""Every NaN stays one, whatever the bits of it that mean nothing: a GPU's is 0x7fffffff."""

import pytest
import torch
from torch import Tensor

from fastssl import functional as F

DINO = {"center": torch.zeros(24), "student_temp": 0.1, "teacher_temp": 0.04}
NANS = [0x7FFFFFFF, 0x7FC00000, 0x7FC00001, 0x7F800001, -1]


def with_nan(shape: tuple[int, ...], bits: int) -> Tensor:
    """Random numbers with one NaN, in the second row."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    x.view(-1, shape[-1]).view(torch.int32)[1, 3] = bits
    assert x.isnan().sum() == 1
    return x


def attention(x: Tensor, backend: str) -> Tensor:
    return F.mask_unit_attention(x, num_heads=2, unit_size=4, backend=backend)


def sinkhorn(x: Tensor, backend: str) -> Tensor:
    return F.sinkhorn_knopp(x, temperature=0.1, backend=backend).isnan().any(dim=1)


def teacher(x: Tensor, backend: str) -> Tensor:
    torch.manual_seed(1)
    return F.dino_cross_entropy(torch.randn(4, 8, 24), x.view(2, 8, 24), **DINO, backend=backend)


def student(x: Tensor, backend: str) -> Tensor:
    torch.manual_seed(1)
    return F.dino_cross_entropy(x.view(4, 4, 24), torch.randn(2, 4, 24), **DINO, backend=backend)


def koleo(x: Tensor, backend: str) -> Tensor:
    return F.koleo(x[:, :8], backend=backend)


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("op", [attention, sinkhorn, teacher, student, koleo])
def test_a_nan_is_seen_where_the_reference_sees_it(op, bits):
    x = with_nan((1, 16, 96) if op is attention else (16, 24), bits)
    actual, expected = op(x, "cpp"), op(x, "reference")
    if op is sinkhorn:
        # The reference's column of NaNs spreads to all rows.
        assert expected.all() and actual[1]
        return
    assert torch.equal(torch.as_tensor(actual).isnan(), torch.as_tensor(expected).isnan())
    assert torch.as_tensor(actual).isnan().any()


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("op", ["nt_xent", "info_nce", "koleo"])
@pytest.mark.parametrize("shape", [(100, 130), (7, 300), (200, 256)], ids=str)
def test_few_rows_give_the_same_bits_on_any_number_of_threads(op, shape, threads):
    """A parallel loop of one task is none, and torch's products use all threads then."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(1 if op == "koleo" else 2)]

    def run() -> list[Tensor]:
        if op == "koleo":
            loss = F.koleo(*inputs, backend="cpp")
        else:
            loss = getattr(F, op)(*inputs, temperature=0.1, backend="cpp")
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        actual = run()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
