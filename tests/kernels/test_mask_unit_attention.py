"""mask_unit_attention: every backend against the float64 formula, forward and backward."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl import functional as F
from fastssl.kernels.mask_unit_attention import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
)

BACKENDS = compiled_backends("mask_unit_attention")


@dataclass(frozen=True)
class Case:
    """B images of `units` units with u tokens each, H heads of `head_dim` channels."""

    B: int
    units: int
    u: int
    H: int
    head_dim: int
    q_stride: int = 1

    def qkv(self, dtype, device):
        shape = (self.B, self.units * self.u, 3 * self.H * self.head_dim)
        return torch.randn(shape).to(device, dtype)

    def grad(self, device):
        shape = (self.B, self.units * self.u // self.q_stride, self.H * self.head_dim)
        return torch.randn(shape).to(device)

    def run(self, backend):
        def call(qkv):
            return F.mask_unit_attention(
                qkv,
                num_heads=self.H,
                unit_size=self.u,
                q_stride=self.q_stride,
                backend=backend,
            )

        return call


# Primes, ones, units that do not fill a tile or the last tile, widths that no register fits.
ODD_CASES = [
    Case(1, 1, 1, 1, 1),
    Case(1, 67, 1, 1, 3),
    Case(2, 1, 13, 2, 7),
    Case(3, 3, 5, 1, 24),
    Case(1, 11, 7, 1, 40),
    Case(1, 19, 4, 1, 96),
    Case(2, 1, 17, 1, 31),
    Case(1, 2, 33, 1, 8),
    Case(1, 1, 64, 1, 160),
    Case(2, 1, 67, 1, 33),
    Case(1, 1, 129, 1, 7),
    Case(1, 1, 70, 1, 256),
    Case(2, 3, 6, 2, 5, q_stride=3),
    Case(1, 5, 9, 1, 17, q_stride=9),
    Case(1, 3, 32, 1, 6, q_stride=32),
    Case(1, 1, 66, 2, 20, q_stride=2),
    Case(1, 1, 256, 1, 16, q_stride=4),
]
# Few units and heads, but of the sizes that the models have.
REAL_CASES = {
    "tiny_base_stage1": Case(1, 2, 64, 1, 96),
    "tiny_base_pool1": Case(1, 2, 64, 2, 96, q_stride=4),
    "tiny_base_stage2": Case(1, 7, 16, 2, 96),
    "tiny_base_pool2": Case(1, 7, 16, 2, 96, q_stride=4),
    "base_plus_stage1": Case(1, 1, 64, 2, 56),
    "base_plus_pool1": Case(1, 1, 64, 2, 56, q_stride=4),
    "large_stage1": Case(1, 1, 64, 2, 72),
    "large_pool1": Case(1, 1, 64, 2, 72, q_stride=4),
    "large_stage2": Case(1, 5, 16, 2, 72),
    "large_pool2": Case(1, 5, 16, 2, 72, q_stride=4),
    "huge_stage1": Case(1, 1, 64, 2, 64),
    "huge_pool1": Case(1, 1, 64, 2, 64, q_stride=4),
    "tiny_base_after_pool2": Case(1, 9, 4, 2, 96),
    "mae_vit_encoder": Case(1, 1, 50, 2, 64),
    "mae_hiera_stage3": Case(1, 1, 80, 1, 96),
    "vit_196": Case(1, 1, 196, 1, 64),
    "mae_decoder": Case(1, 1, 197, 1, 32),
    "huge_patch14": Case(1, 1, 65, 1, 80),
    "vit_huge_256": Case(1, 1, 256, 1, 80),
}
# The interpreter takes long: real sizes in the dtype of training only.
REAL_RUNS = [
    pytest.param(*backend.values, dtype, marks=backend.marks, id=f"{backend.values[0]}-{dtype}")
    for backend in BACKENDS
    for dtype in DTYPES
    if dtype == torch.bfloat16 or "cpp" in backend.values or torch.cuda.is_available()
]
SMALL = Case(2, 3, 8, 2, 8)
SMALL_POOLED = Case(2, 3, 8, 2, 8, q_stride=4)
# One unit in more than one tile.
LARGE = Case(1, 2, 80, 1, 16)
LARGE_POOLED = Case(1, 1, 80, 1, 16, q_stride=4)


def check_against_float64(case, dtype, backend):
    device = device_of(backend)
    qkv, grad = case.qkv(dtype, device), case.grad(device)
    actual = gradients(case.run(backend), [qkv], grad)
    eager = gradients(case.run("reference"), [qkv], grad)
    truth = gradients(case.run("reference"), [qkv.double()], grad.to(dtype))
    assert actual[0].dtype == actual[1][0].dtype == dtype
    assert_close_to_truth("out", actual[0], eager[0], truth[0])
    # By part, since the gradient of v is many times that of q and k.
    parts = (grads[0].chunk(3, dim=2) for grads in (actual[1], eager[1], truth[1]))
    for name, *grads in zip(("dq", "dk", "dv"), *parts, strict=True):
        assert_close_to_truth(name, *grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_against_float64(case, dtype, backend, poisoned_memory):
    check_against_float64(case, dtype, backend)


@pytest.mark.parametrize(("backend", "dtype"), REAL_RUNS)
@pytest.mark.parametrize("name", REAL_CASES)
def test_real_sizes_against_float64(name, backend, dtype, poisoned_memory):
    check_against_float64(REAL_CASES[name], dtype, backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("case", [SMALL, SMALL_POOLED], ids=["plain", "pooled"])
def test_formula_written_out(case, backend):
    qkv = case.qkv(torch.float32, device_of(backend))
    out = case.run(backend)(qkv)
    queries, width = case.u // case.q_stride, case.H * case.head_dim
    for b in range(case.B):
        for unit in range(case.units):
            tokens = qkv[b, unit * case.u : (unit + 1) * case.u]
            for head in range(case.H):
                first = head * case.head_dim
                q, k, v = (
                    tokens[:, part * width + first :][:, : case.head_dim] for part in range(3)
                )
                for i in range(queries):
                    query = q[i::queries].amax(0)
                    weights = torch.softmax(k @ query / case.head_dim**0.5, dim=0)
                    row = out[b, unit * queries + i, first : first + case.head_dim]
                    torch.testing.assert_close(row, weights @ v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_unit_size_is_global_attention(backend):
    qkv = torch.randn(2, 21, 48, device=device_of(backend))
    actual = F.mask_unit_attention(qkv, num_heads=2, backend=backend)
    q, k, v = qkv.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(actual, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("case", [SMALL_POOLED, LARGE_POOLED], ids=["unit", "blocks"])
def test_gradient_goes_to_the_first_maximum(case, backend):
    device = device_of(backend)
    qkv, grad = case.qkv(torch.float32, device), case.grad(device)
    width = case.H * case.head_dim
    # [B, units, q_stride, queries, D]
    shape = (case.B, case.units, case.q_stride, -1, width)
    queries = qkv[..., :width].reshape(shape)
    queries[:, :, 0] = queries[:, :, 2]
    queries[:, :, 1] = queries[:, :, 2] - 1
    queries[:, :, 3] = queries[:, :, 2]
    qkv[..., :width] = queries.reshape(case.B, -1, width)
    _, (dqkv,) = gradients(case.run(backend), [qkv], grad)
    dq = dqkv[..., :width].reshape(shape)
    assert (dq[:, :, 0] != 0).all()
    assert (dq[:, :, 1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SMALL_POOLED, LARGE_POOLED], ids=["unit", "blocks"])
def test_negative_queries_are_pooled_too(case, backend):
    """A candidate beyond the unit would read as zero and win."""
    qkv = case.qkv(torch.float32, device_of(backend))
    qkv[..., : case.H * case.head_dim] -= 100
    expected = case.run("reference")(qkv)
    torch.testing.assert_close(case.run(backend)(qkv), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(2, 2, 8, 1, 8), Case(1, 1, 80, 1, 80)], ids=["u8", "u80"])
def test_logits_of_nine_digits_pick_one_key(case, dtype, backend):
    """Scores lie around +-1e8, so the softmax is one or zero, and its gradient zero (but for what
    rounding leaves of 1 - 1, times keys of 30000)."""
    device = device_of(backend)
    qkv, grad = case.qkv(dtype, device), case.grad(device).to(dtype)
    q, k, v = qkv.unflatten(1, (-1, case.u)).chunk(3, dim=3)
    key = torch.randperm(case.u, device=device)
    q.fill_(-30000.0)[..., torch.arange(case.u, device=device), key] = 30000.0
    k.copy_(torch.eye(case.u, device=device).mul(30000))
    out, (dqkv,) = gradients(case.run(backend), [qkv], grad)
    dq, dk, dv = dqkv.unflatten(1, (-1, case.u)).chunk(3, dim=3)
    # A GPU's products take float32 apart, into three parts of which the last one is short.
    exact = {"rtol": 2**-21 if device.type == "cuda" else 0, "atol": 0}
    torch.testing.assert_close(out.unflatten(1, (-1, case.u)), v[:, :, key], **exact)
    torch.testing.assert_close(dv[:, :, key], grad.unflatten(1, (-1, case.u)), **exact)
    assert dq.abs().max() < 0.03 and dk.abs().max() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SMALL, SMALL_POOLED, LARGE], ids=["u8", "pooled", "u80"])
def test_equal_logits_below_minus_1e9_average(case, backend):
    device = device_of(backend)
    qkv, grad = case.qkv(torch.float32, device), case.grad(device)
    q, k, v = qkv.chunk(3, dim=2)
    # Powers of two, whose sums of products are exact in any order.
    q.fill_(-32768.0)
    k.fill_(32768.0)
    out, (dqkv,) = gradients(case.run(backend), [qkv], grad)
    mean = v.unflatten(1, (-1, case.u)).mean(2, keepdim=True)
    expected = mean.expand(-1, -1, case.u // case.q_stride, -1).flatten(1, 2)
    torch.testing.assert_close(out, expected)
    assert torch.isfinite(dqkv).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("member", range(4))
def test_nan_is_a_maximum(member, backend):
    """As in torch, so that a diverged run shows."""
    qkv = SMALL_POOLED.qkv(torch.float32, device_of(backend))
    qkv[0, 2 * member + 1, 5] = float("nan")
    out = SMALL_POOLED.run(backend)(qkv)
    assert out[0, 1, :8].isnan().all()
    assert not out[:, 6:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SMALL, SMALL_POOLED, LARGE], ids=["u8", "pooled", "u80"])
def test_units_do_not_see_each_other(case, backend):
    device = device_of(backend)
    qkv, grad = case.qkv(torch.float32, device), case.grad(device)
    other_qkv, other_grad = qkv.clone(), grad.clone()
    other_qkv[0, case.u : 2 * case.u] += 3
    other_grad[0, case.u // case.q_stride : 2 * case.u // case.q_stride] += 3
    out, (dqkv,) = gradients(case.run(backend), [qkv], grad)
    other_out, (other_dqkv,) = gradients(case.run(backend), [other_qkv], other_grad)
    for one, other in ((out, other_out), (dqkv, other_dqkv)):
        one, other = (value.unflatten(1, (case.units, -1)).flatten(0, 1) for value in (one, other))
        differs = (one != other).flatten(1).any(1).tolist()
        assert differs == [unit == 1 for unit in range(case.B * case.units)]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_strided_tensors(backend):
    """A part of a wider tensor goes in, an expanded gradient comes back."""
    wide = torch.randn(24, 2, 100, device=device_of(backend), requires_grad=True)
    out = SMALL.run(backend)(wide.transpose(0, 1)[:, :, 7:55])
    out.sum().backward()
    copy = wide.detach().transpose(0, 1)[:, :, 7:55].contiguous()
    expected, (dqkv,) = gradients(SMALL.run("reference"), [copy], torch.ones_like(out))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(wide.grad.transpose(0, 1)[:, :, 7:55], dqkv)
    assert (wide.grad[:, :, :7] == 0).all() and (wide.grad[:, :, 55:] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_images(backend):
    qkv = torch.empty(0, 64, 288, device=device_of(backend), requires_grad=True)
    out = F.mask_unit_attention(qkv, num_heads=1, unit_size=16, q_stride=4, backend=backend)
    assert out.shape == (0, 16, 96)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny_base_pool1", "tiny_base_stage2", "mae_hiera_stage3"])
def test_runs_give_the_same_bits(name, backend):
    case, device = REAL_CASES[name], device_of(backend)
    qkv, grad = case.qkv(torch.bfloat16, device), case.grad(device)
    first, second = (gradients(case.run(backend), [qkv], grad) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Case(3, 7, 16, 2, 24, 4), Case(3, 1, 80, 3, 32)], ids=str)
def test_threads_give_the_same_bits(case, dtype):
    qkv, grad = case.qkv(dtype, "cpu"), case.grad("cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(case.run("cpp"), [qkv], grad))
    finally:
        torch.set_num_threads(before)
    for out, (dqkv,) in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(dqkv, results[0][1][0])


@pytest.mark.parametrize("case", [Case(2, 2, 3, 2, 2), Case(1, 2, 6, 1, 3, 2)], ids=str)
def test_reference_gradcheck(case):
    qkv = case.qkv(torch.float64, "cpu").requires_grad_()
    torch.autograd.gradcheck(case.run("reference"), qkv)
    torch.autograd.gradgradcheck(case.run("reference"), qkv)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    case, device = SMALL_POOLED, device_of(backend)
    qkv, grad = case.qkv(torch.float32, device), case.grad(device)
    settings = (case.H, case.u, case.q_stride, backend)
    op = torch.ops.fastssl.mask_unit_attention
    torch.library.opcheck(op, (qkv.clone().requires_grad_(), *settings))
    if backend != "reference":
        op = torch.ops.fastssl.mask_unit_attention_backward
        torch.library.opcheck(op, (grad, qkv, *settings))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    case, device = SMALL_POOLED, device_of(backend)
    qkv, grad = case.qkv(torch.float32, device), case.grad(device)
    compiled = torch.compile(case.run(backend), fullgraph=True)
    actual, expected = (gradients(f, [qkv], grad) for f in (compiled, case.run("reference")))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_those_of_the_two_products(backend):
    case = SMALL_POOLED
    qkv = case.qkv(torch.float32, device_of(backend)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = case.run(backend)(qkv)
    # Queries times keys times channels, twice, two operations each.
    forward = 4 * out.numel() * case.u
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", ["unit_size 257 is above 256", "width 257 is above 256"])
def test_too_large_is_for_the_reference(message, backend):
    tokens, width = (257, 12) if "unit_size" in message else (4, 3 * 257)
    qkv = torch.randn(1, tokens, width, device=device_of(backend))
    with pytest.raises(ValueError, match=f"cannot run mask_unit_attention: .*{message}"):
        F.mask_unit_attention(qkv, num_heads=1, backend=backend)
    out = F.mask_unit_attention(qkv, num_heads=1)
    expected = F.mask_unit_attention(qkv, num_heads=1, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_for_the_reference(backend):
    qkv = SMALL.qkv(torch.float64, device_of(backend))
    assert torch.equal(SMALL.run(None)(qkv), reference.mask_unit_attention(qkv, 2, 8, 1))
    with pytest.raises(ValueError, match="float64 is served by the reference only"):
        SMALL.run(backend)(qkv)


BAD = {
    "qkv must be a Tensor, got list": {"qkv": [1.0]},
    "qkv must be float32 or bfloat16 or float16 or float64, got int64": {
        "qkv": torch.zeros(2, 8, 24, dtype=torch.int64)
    },
    "qkv must have 3 dimensions, got shape (8, 24)": {"qkv": torch.zeros(8, 24)},
    "qkv must have 3 * D channels, D divisible by num_heads = 3, got 24": {"num_heads": 3},
    "qkv must have 3 * D channels, D divisible by num_heads = 2, got 0": {
        "qkv": torch.zeros(2, 8, 0)
    },
    "num_heads must be an int, got float": {"num_heads": 2.0},
    "num_heads must be at least 1, got 0": {"num_heads": 0},
    "unit_size must be an int, got str": {"unit_size": "4"},
    "unit_size must be at least 1, got 0": {"unit_size": 0},
    "qkv must hold whole units of unit_size = 3 tokens, got 8 tokens": {"unit_size": 3},
    "q_stride must be at least 1, got 0": {"q_stride": 0},
    "unit_size must be divisible by q_stride = 3, got 4": {"q_stride": 3},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"qkv": torch.zeros(2, 8, 24), "num_heads": 2, "unit_size": 4, "q_stride": 2}
    F.mask_unit_attention(**good)
    with pytest.raises((TypeError, ValueError)) as error:
        F.mask_unit_attention(**{**good, **BAD[message]})
    assert message in str(error.value)
