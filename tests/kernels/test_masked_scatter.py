"""masked_scatter: every backend against the float64 formula, forward and backward."""

import pytest
import torch

from fastssl import functional as F
from fastssl.kernels.masked_scatter import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("masked_scatter")
# B, P, K, N, D: primes, ones, nothing kept, all kept, and the decoder of MAE's ViT-B.
SHAPES = [
    (1, 0, 1, 1, 1),
    (3, 1, 5, 13, 37),
    (2, 3, 0, 7, 16),
    (2, 0, 11, 11, 129),
    (5, 1, 49, 196, 512),
]


def make_inputs(shape, dtype, device, index_dtype=torch.int32):
    B, P, K, N, D = shape
    x = torch.randn(B, P + K, D).to(device, dtype)
    mask_token = torch.randn(D).to(device, dtype)
    ids_restore = torch.stack([torch.randperm(N) for _ in range(B)]).to(device, index_dtype)
    pos = torch.randn(P + N, D).to(device, dtype)
    return x, mask_token, ids_restore, pos


def run(P, backend):
    def call(x, mask_token, ids_restore, pos):
        return F.masked_scatter(
            x, mask_token, ids_restore, pos, num_prefix_tokens=P, backend=backend
        )

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    inputs = make_inputs(shape, dtype, device_of(backend))
    B, P, _, N, D = shape
    grad = torch.randn(B, P + N, D, device=inputs[0].device)
    actual = gradients(run(P, backend), inputs, grad)
    eager = gradients(run(P, "reference"), inputs, grad)
    truth = gradients(run(P, "reference"), [to_double(value) for value in inputs], grad)
    assert actual[0].dtype == dtype
    assert_close_to_truth("out", actual[0], eager[0], truth[0])
    names = ("dx", "dmask_token", "dpos")
    for name, *grads in zip(names, actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(name, *grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_written_out(backend):
    x, mask_token, ids_restore, pos = make_inputs(
        (2, 2, 3, 5, 4), torch.float32, device_of(backend)
    )
    out = run(2, backend)(x, mask_token, ids_restore, pos)
    for b in range(2):
        for p in range(2):
            torch.testing.assert_close(out[b, p], x[b, p] + pos[p])
        for n in range(5):
            rank = int(ids_restore[b, n])
            token = x[b, 2 + rank] if rank < 3 else mask_token
            torch.testing.assert_close(out[b, 2 + n], token + pos[2 + n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix_rows", [0, 1])
def test_operands_may_lie_in_memory_as_they_like(prefix_rows, backend):
    x, _, ids_restore, _ = make_inputs((2, 1, 3, 6, 16), torch.float32, device_of(backend))
    mask_token = torch.randn(1, 1, 32, device=x.device)[..., ::2]
    pos = torch.randn(1, 16, prefix_rows + 6, device=x.device).transpose(1, 2)
    out = run(1, backend)(x, mask_token, ids_restore, pos)
    expected = run(1, "reference")(x, mask_token, ids_restore, pos)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_promote(backend):
    """bf16 tokens with float32 mask token and positions give a float32 residual stream."""
    x, mask_token, ids_restore, pos = make_inputs(
        (2, 1, 3, 8, 24), torch.float32, device_of(backend)
    )
    grad = torch.randn(2, 9, 24, device=x.device)
    inputs = (x.bfloat16(), mask_token, ids_restore.long(), pos[1:])
    actual = gradients(run(1, backend), inputs, grad)
    expected = gradients(run(1, "reference"), inputs, grad)
    assert actual[0].dtype == torch.float32
    assert [g.dtype for g in actual[1]] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    x, mask_token, ids_restore, _ = make_inputs((2, 1, 3, 8, 24), torch.float32, device_of(backend))
    x.requires_grad_()
    F.masked_scatter(
        x, mask_token, ids_restore, num_prefix_tokens=1, backend=backend
    ).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_give_the_same_bits(backend):
    inputs = make_inputs((5, 1, 49, 196, 64), torch.float32, device_of(backend))
    grad = torch.randn(5, 197, 64, device=inputs[0].device)
    first, second = (gradients(run(1, backend), inputs, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_reference_gradcheck():
    inputs = [to_double(value) for value in make_inputs((2, 1, 2, 5, 3), torch.float64, "cpu")]
    floats = [v.requires_grad_() for v in inputs if v.is_floating_point()]
    torch.autograd.gradcheck(
        lambda x, m, p: reference.masked_scatter(x, m, inputs[2], p, 1), floats
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    device = device_of(backend)
    x, mask_token, ids_restore, pos = make_inputs((2, 1, 3, 8, 24), torch.float32, device)
    args = (x.requires_grad_(), mask_token.requires_grad_(), ids_restore, pos.requires_grad_())
    torch.library.opcheck(torch.ops.fastssl.masked_scatter, (*args, 1, torch.float32, backend))
    if backend != "reference":
        grad = torch.randn(2, 9, 24, device=device)
        args = (grad, ids_restore, 3, 1, True, True, torch.float32, backend)
        torch.library.opcheck(torch.ops.fastssl.masked_scatter_backward, args)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    inputs = make_inputs((2, 1, 3, 8, 24), torch.float32, device_of(backend))
    grad = torch.randn(2, 9, 24, device=inputs[0].device)
    compiled = torch.compile(run(1, backend), fullgraph=True)
    actual, expected = (gradients(f, inputs, grad) for f in (compiled, run(1, "reference")))
    torch.testing.assert_close(actual, expected)


BAD = {
    "x must have 3 dimensions, got shape (4, 8)": {"x": torch.zeros(4, 8)},
    "x must be a Tensor, got list": {"x": [1.0]},
    "mask_token must have shape [D] = [8]": {"mask_token": torch.zeros(7)},
    "ids_restore must be int32 or int64, got float32": {"ids_restore": torch.zeros(2, 5)},
    "ids_restore must have shape [B, N] = [2, any], got [3, 5]": {
        "ids_restore": torch.zeros(3, 5, dtype=torch.int32)
    },
    "num_prefix_tokens must be at least 0, got -1": {"num_prefix_tokens": -1},
    "got 4 tokens and num_prefix_tokens = 5": {"num_prefix_tokens": 5},
    "pos must have shape [5, 8] or [6, 8]": {"pos": torch.zeros(4, 8), "num_prefix_tokens": 1},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {
        "x": torch.zeros(2, 4, 8),
        "mask_token": torch.zeros(8),
        "ids_restore": torch.arange(5, dtype=torch.int32).repeat(2, 1),
    }
    with pytest.raises((TypeError, ValueError)) as error:
        F.masked_scatter(**{**good, **BAD[message]})
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 5, 2**30])
def test_cpp_refuses_indices_out_of_range(wrong, dtype):
    ids_restore = torch.arange(5, dtype=dtype).repeat(2, 1)
    ids_restore[1, 3] = wrong
    with pytest.raises(RuntimeError, match=f"ids_restore must lie in 0 .. 4, got {wrong}"):
        F.masked_scatter(torch.zeros(2, 4, 8), torch.zeros(8), ids_restore, backend="cpp")
