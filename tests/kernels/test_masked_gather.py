"""masked_gather: every backend against the float64 formula, forward and backward."""

import pytest
import torch

from fastssl import functional as F
from fastssl.kernels.masked_gather import reference
from tests.kernels.util import (
    DTYPES,
    assert_close_to_truth,
    compiled_backends,
    device_of,
    gradients,
    to_double,
)

BACKENDS = compiled_backends("masked_gather")
# B, P, K, N, D: primes, ones, nothing kept, all kept, and the encoder of MAE's ViT-B.
SHAPES = [
    (1, 0, 1, 1, 1),
    (3, 1, 5, 13, 37),
    (2, 3, 0, 7, 16),
    (2, 0, 11, 11, 129),
    (2, 1, 49, 196, 768),
]


def make_inputs(shape, dtype, device, index_dtype=torch.int32):
    """x, ids_keep, pos, ids_restore."""
    B, P, K, N, D = shape
    x = torch.randn(B, P + N, D).to(device, dtype)
    ids_shuffle = torch.stack([torch.randperm(N) for _ in range(B)])
    ids_restore = ids_shuffle.argsort(1).to(device, index_dtype)
    pos = torch.randn(P + N, D).to(device, dtype)
    return x, ids_shuffle[:, :K].to(device, index_dtype), pos, ids_restore


def run(P, backend):
    def call(x, ids_keep, pos, ids_restore=None):
        return F.masked_gather(
            x, ids_keep, pos, ids_restore=ids_restore, num_prefix_tokens=P, backend=backend
        )

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend, poisoned_memory):
    inputs = make_inputs(shape, dtype, device_of(backend))
    B, P, K, _, D = shape
    grad = torch.randn(B, P + K, D, device=inputs[0].device)
    actual = gradients(run(P, backend), inputs, grad)
    eager = gradients(run(P, "reference"), inputs, grad)
    truth = gradients(run(P, "reference"), [to_double(value) for value in inputs], grad)
    assert actual[0].dtype == dtype
    assert_close_to_truth("out", actual[0], eager[0], truth[0])
    for name, *grads in zip(("dx", "dpos"), actual[1], eager[1], truth[1], strict=True):
        assert_close_to_truth(name, *grads)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_formula_written_out(backend):
    x, ids_keep, pos, _ = make_inputs((2, 2, 3, 5, 4), torch.float32, device_of(backend))
    grad = torch.randn(2, 5, 4, device=x.device)
    out, (dx, dpos) = gradients(run(2, backend), (x, ids_keep, pos), grad)
    expected_dx = torch.zeros_like(dx)
    for b in range(2):
        for p in range(2):
            torch.testing.assert_close(out[b, p], x[b, p] + pos[p])
            expected_dx[b, p] = grad[b, p]
        for k in range(3):
            n = 2 + int(ids_keep[b, k])
            torch.testing.assert_close(out[b, 2 + k], x[b, n] + pos[n])
            expected_dx[b, n] = grad[b, 2 + k]
    torch.testing.assert_close(dx, expected_dx, rtol=0, atol=0)
    torch.testing.assert_close(dpos, expected_dx.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_inverse_computed_inside_is_ids_restore(shape, index_dtype, backend):
    """And anything not below K stands for a removed token."""
    B, P, K, N, D = shape
    inputs = make_inputs(shape, torch.float32, device_of(backend), index_dtype)
    grad = torch.randn(B, P + K, D, device=inputs[0].device)
    given = gradients(run(P, backend), inputs, grad)
    inside = gradients(run(P, backend), inputs[:3], grad)
    cut = gradients(run(P, backend), (*inputs[:3], inputs[3].clamp(max=min(K, N - 1))), grad)
    assert torch.equal(given[0], inside[0])
    for a, b, c in zip(given[1], inside[1], cut[1], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prefix_rows", [0, 1, 2])
def test_positions_may_lie_in_memory_as_they_like(prefix_rows, backend):
    P = min(prefix_rows, 1)
    x, ids_keep, _, _ = make_inputs((2, P, 3, 6, 16), torch.float32, device_of(backend))
    # As a convolution's output becomes tokens; of two prefix rows the first is not meant.
    pos = torch.randn(1, 16, prefix_rows + 6, device=x.device).transpose(1, 2)
    pos = pos[:, 1:] if prefix_rows == 2 else pos
    assert not pos.is_contiguous()
    out = run(P, backend)(x, ids_keep, pos)
    torch.testing.assert_close(out, run(P, "reference")(x, ids_keep, pos), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_random_masking_gives(backend):
    noise = torch.rand(3, 50, device=device_of(backend))
    ids_keep, ids_restore, mask = F.random_masking(noise, 20)
    x = torch.randn(3, 51, 24, device=noise.device).requires_grad_()
    out = F.masked_gather(
        x, ids_keep, ids_restore=ids_restore, num_prefix_tokens=1, backend=backend
    )
    out.backward(torch.ones_like(out))
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(x.grad[:, 1:], (1 - mask)[..., None].expand(3, 50, 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_promote(backend):
    """bf16 tokens with float32 positions give a float32 residual stream; no row for the prefix."""
    x, ids_keep, pos, ids_restore = make_inputs((2, 1, 3, 8, 24), torch.float32, device_of(backend))
    grad = torch.randn(2, 4, 24, device=x.device)
    inputs = (x.bfloat16(), ids_keep.long(), pos[None, 1:], ids_restore)
    actual = gradients(run(1, backend), inputs, grad)
    expected = gradients(run(1, "reference"), inputs, grad)
    assert actual[0].dtype == torch.float32
    assert [g.dtype for g in actual[1]] == [torch.bfloat16, torch.float32]
    assert torch.equal(actual[0][:, 0], x.bfloat16()[:, 0].float())
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_positions_bits_are_copied(dtype, backend):
    x, ids_keep, _, ids_restore = make_inputs((2, 1, 3, 8, 24), dtype, device_of(backend))
    x[0, 0], x[1, 1] = float("inf"), float("nan")
    index = ids_keep.long()[..., None].expand(-1, -1, 24)
    expected = torch.cat([x[:, :1], x[:, 1:].gather(1, index)], 1)
    out, (dx,) = gradients(run(1, backend), (x, ids_keep, None, ids_restore), expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    kept = torch.cat([torch.ones_like(ids_restore[:, :1]).bool(), ids_restore < 3], 1)
    torch.testing.assert_close(dx[kept], x[kept], rtol=0, atol=0, equal_nan=True)
    assert (dx[~kept] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    x, ids_keep, pos, ids_restore = make_inputs((2, 1, 3, 8, 24), torch.float32, device_of(backend))
    pos.requires_grad_()
    run(1, backend)(x, ids_keep, pos, ids_restore).sum().backward()
    expected = torch.bincount(1 + ids_keep.flatten(), minlength=9).float()
    expected[0] = 2
    torch.testing.assert_close(pos.grad, expected[:, None].expand(9, 24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_and_thread_counts_give_the_same_bits(backend):
    inputs = make_inputs((5, 1, 19, 76, 64), torch.float32, device_of(backend))
    grad = torch.randn(5, 20, 64, device=inputs[0].device)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            results.append(gradients(run(1, backend), inputs, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_no_tokens(backend):
    for shape in ((0, 1, 3, 8, 16), (2, 1, 0, 0, 16), (2, 0, 0, 5, 16)):
        B, P, K, N, D = shape
        inputs = (
            make_inputs(shape, torch.float32, device_of(backend))
            if B
            else (torch.empty(0, P + N, D), torch.empty(0, K).int(), torch.zeros(P + N, D), None)
        )
        inputs = [v.to(device_of(backend)) if torch.is_tensor(v) else v for v in inputs]
        out, (dx, dpos) = gradients(run(P, backend), inputs, torch.ones(B, P + K, D).to(inputs[0]))
        assert out.shape == (B, P + K, D) and dx.shape == (B, P + N, D)
        expected = torch.zeros(P + N, D)
        expected[:P] = B
        assert torch.equal(dpos.cpu(), expected)


def test_reference_gradcheck():
    x, ids_keep, pos, _ = make_inputs((2, 1, 2, 5, 3), torch.float64, "cpu")
    torch.autograd.gradcheck(
        lambda x, pos: reference.masked_gather(x, ids_keep, pos, 1),
        (x.requires_grad_(), pos.requires_grad_()),
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    device = device_of(backend)
    x, ids_keep, pos, ids_restore = make_inputs((2, 1, 3, 8, 24), torch.float32, device)
    for restore in (ids_restore, None):
        args = (x.requires_grad_(), ids_keep, pos.requires_grad_(), 1, restore, torch.float32)
        torch.library.opcheck(torch.ops.fastssl.masked_gather, (*args, backend))
    if backend != "reference":
        grad = torch.randn(2, 4, 24, device=device)
        args = (grad, ids_restore, 1, True, torch.float32, backend)
        torch.library.opcheck(torch.ops.fastssl.masked_gather_backward, args)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("gives_ids_restore", [True, False])
def test_compiles_without_a_graph_break(gives_ids_restore, backend):
    inputs = make_inputs((2, 1, 3, 8, 24), torch.float32, device_of(backend))
    inputs = inputs if gives_ids_restore else inputs[:3]
    grad = torch.randn(2, 4, 24, device=inputs[0].device)
    compiled = torch.compile(run(1, backend), fullgraph=True)
    actual, expected = (gradients(f, inputs, grad) for f in (compiled, run(1, "reference")))
    torch.testing.assert_close(actual, expected)


def test_export_sees_plain_operators():
    """While torch.compile sees the op; torch 2.11 confuses the two."""
    x, ids_keep, pos, _ = make_inputs((2, 1, 3, 8, 24), torch.float32, "cpu")

    class Model(torch.nn.Module):
        def forward(self, x, ids_keep, pos):
            return F.masked_gather(x, ids_keep, pos, num_prefix_tokens=1)

    def backend(module, _):
        compiled.extend(str(node.target) for node in module.graph.nodes)
        return module

    compiled = []
    program = torch.export.export(Model(), (x, ids_keep, pos))
    exported = [str(node.target) for node in program.graph.nodes]
    assert any("gather" in name for name in exported)
    assert not any("fastssl" in name for name in exported)
    expected = run(1, "reference")(x, ids_keep, pos)
    torch.testing.assert_close(program.module()(x, ids_keep, pos), expected)
    out = torch.compile(run(1, "cpp"), backend=backend, fullgraph=True)(x, ids_keep, pos)
    assert any("fastssl" in name for name in compiled)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 8, 2**30])
def test_cpp_refuses_indices_out_of_range(wrong, dtype):
    x, ids_keep, pos, ids_restore = make_inputs((2, 1, 3, 8, 24), torch.float32, "cpu", dtype)
    bad = ids_keep.clone()
    bad[1, 2] = wrong
    with pytest.raises(RuntimeError, match=f"ids_keep must lie in 0 .. 7, got {wrong}"):
        run(1, "cpp")(x, bad, pos)
    bad = ids_restore.clone()
    bad[0, 3] = wrong
    out = run(1, "cpp")(x.requires_grad_(), ids_keep, pos, bad)
    with pytest.raises(RuntimeError, match=f"ids_restore must lie in 0 .. 7, got {wrong}"):
        out.sum().backward()


BAD = {
    "x must have 3 dimensions, got shape (4, 8)": {"x": torch.zeros(4, 8)},
    "x must be a Tensor, got list": {"x": [1.0]},
    "x must hold at least num_prefix_tokens = 7 tokens, got 6": {"num_prefix_tokens": 7},
    "ids_keep must be int32 or int64, got float32": {"ids_keep": torch.zeros(2, 3)},
    "ids_keep must have shape [B, K] = [2, any], got [3, 3]": {
        "ids_keep": torch.zeros(3, 3, dtype=torch.int32)
    },
    "ids_keep must keep at most N = 6 tokens, got 7": {
        "ids_keep": torch.zeros(2, 7, dtype=torch.int32)
    },
    "ids_restore must have shape [B, N] = [2, 6], got [2, 5]": {
        "ids_restore": torch.zeros(2, 5, dtype=torch.int32)
    },
    "num_prefix_tokens must be at least 0, got -1": {"num_prefix_tokens": -1},
    "pos must have shape [5, 8] or [6, 8]": {"pos": torch.zeros(4, 8), "num_prefix_tokens": 1},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"x": torch.zeros(2, 6, 8), "ids_keep": torch.arange(3).int().repeat(2, 1)}
    with pytest.raises((TypeError, ValueError)) as error:
        F.masked_gather(**{**good, **BAD[message]})
    assert message in str(error.value)
