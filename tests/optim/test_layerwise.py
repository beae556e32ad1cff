"""LARS and LAMB against their formulas in float64, alone and sharded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.optim import LAMB, LARS, build_lamb, build_lars, set_hyperparameters
from fastssl.optim.layerwise import local, whole_norms

OPTIMIZERS = {"lars": LARS, "lamb": LAMB}
BUILDERS = {"lars": build_lars, "lamb": build_lamb}
LR, DECAY = 0.3, 0.1


def make_parameters(dtype=torch.float32):
    """A matrix, a vector, a convolution, a token, a scalar, and a matrix of zeros."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 7), (7,), (3, 2, 2, 2), (1, 1, 6), ()]
    parameters = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return [nn.Parameter(p) for p in [*parameters, torch.zeros(4, 4, dtype=dtype)]]


def make_gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(p.shape, generator=generator) for p in make_parameters()]
    gradients[2] = gradients[2] * (step != 0)  # a gradient of zeros, in the first step
    return gradients


def ratio(w, u, coefficient=1.0):
    return coefficient * w.norm() / u.norm() if w.norm() > 0 and u.norm() > 0 else 1.0


def lars(w, g, state, t, decay, adapts):
    if adapts:
        u = g + decay * w
        g = u * ratio(w, u, 0.001)
    state["m"] = 0.9 * state.get("m", 0) + g
    return w - LR * state["m"]


def lamb(w, g, state, t, decay, adapts):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    u = (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-6)
    if adapts:
        u = u + decay * w
        u = u * ratio(w, u)
    return w - LR * u


FORMULAS = {"lars": lars, "lamb": lamb}


def run(optimizer, parameters, steps):
    for step in steps:
        for p, g in zip(parameters, make_gradients(step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def truth(name, steps, *, decay=DECAY, exclude_1d=True):
    weights = [p.detach().double() for p in make_parameters()]
    states = [{} for _ in weights]
    for t, step in enumerate(steps, start=1):
        for i, g in enumerate(make_gradients(step)):
            adapts = weights[i].ndim > 1 or not exclude_1d
            weights[i] = FORMULAS[name](weights[i], g.double(), states[i], t, decay, adapts)
    return weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exclude_1d", [True, False])
@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_against_the_formula(name, decay, exclude_1d, dtype):
    parameters = make_parameters(dtype)
    optimizer = OPTIMIZERS[name](parameters, LR, weight_decay=decay, exclude_1d=exclude_1d)
    run(optimizer, parameters, range(5))
    rtol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    for p, expected in zip(
        parameters, truth(name, range(5), decay=decay, exclude_1d=exclude_1d), strict=True
    ):
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_have_values_of_their_own(name):
    first, second = make_parameters(), make_parameters()
    groups = [
        {"params": first, "lr": 0.0},
        {"params": second, "weight_decay": DECAY},
    ]
    optimizer = OPTIMIZERS[name](groups, LR)
    for step in range(3):
        for parameters in (first, second):
            for p, g in zip(parameters, make_gradients(step), strict=True):
                p.grad = g.clone()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first, make_parameters(), strict=True))
    for p, expected in zip(second, truth(name, range(3)), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_stays(name):
    parameters = make_parameters()
    optimizer = OPTIMIZERS[name](parameters, LR, weight_decay=DECAY)
    run(optimizer, parameters, [0])
    still = parameters[0].detach().clone()
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[0].grad = None
    optimizer.step()
    assert torch.equal(parameters[0], still)
    assert not torch.equal(parameters[1], still)
    run(optimizer, parameters, [1])  # this is its second step, not its third
    torch.testing.assert_close(
        parameters[0].detach().double(), truth(name, [0, 1])[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_goes_on_where_it_stopped(name, tmp_path):
    straight = make_parameters()
    run(OPTIMIZERS[name](straight, LR, weight_decay=DECAY), straight, range(6))

    parameters = make_parameters()
    optimizer = OPTIMIZERS[name](parameters, LR, weight_decay=DECAY)
    run(optimizer, parameters, range(3))
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    parameters, state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer = OPTIMIZERS[name](parameters, 9.0)
    optimizer.load_state_dict(state)
    run(optimizer, parameters, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(parameters, straight, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_beforehand_changes_nothing(name):
    late, early = make_parameters(), make_parameters()
    run(OPTIMIZERS[name](late, LR, weight_decay=DECAY), late, range(3))
    optimizer = OPTIMIZERS[name](early, LR, weight_decay=DECAY)
    optimizer.make_state()
    keys = {tuple(optimizer.state[p]) for p in early}
    assert keys == {("momentum_buffer",) if name == "lars" else ("step", "exp_avg", "exp_avg_sq")}
    run(optimizer, early, range(3))
    assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure(name):
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = OPTIMIZERS[name]([w], LR)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert optimizer.step(closure).item() < 4.0
    assert optimizer.step() is None


class HostReads(TorchDispatchMode):
    """Counts what would wait for a GPU: values of tensors that become Python numbers."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_norm_comes_to_the_host(name):
    parameters = make_parameters()
    optimizer = OPTIMIZERS[name](parameters, LR, weight_decay=DECAY)
    optimizer.make_state()
    steps = [s["step"].data_ptr() for s in optimizer.state.values() if "step" in s]
    with HostReads() as reads:
        run(optimizer, parameters, [0])
    # LAMB's own counters, which are on the CPU wherever the parameters are.
    assert sorted(x.data_ptr() for x in reads.read) == sorted(steps)


def make_model():
    torch.manual_seed(3)
    # 5 and 3 rows: two ranks get unequal shards, and one of the bias [1] gets none.
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3), nn.Linear(3, 1)
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(name, world_size, mesh_shape):
    model = make_model()
    rank = 0
    if world_size > 1:
        names = ("replicate", "shard")[2 - len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        rank = torch.distributed.get_rank()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = BUILDERS[name](model)
    x = torch.linspace(-1, 1, 8 * 6).reshape(8, 6).sin()
    for _ in range(4):
        set_hyperparameters(optimizer, lr=LR if name == "lamb" else 30.0, weight_decay=DECAY)
        model(x.chunk(world_size)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = {n: whole(p.detach()) for n, p in model.named_parameters()}
    states = {
        f"{i}.{k}": whole(v)
        for i, p in enumerate(model.parameters())
        for k, v in optimizer.state[p].items()
    }
    return values | states


@pytest.mark.parametrize(
    "mesh_shape", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["fsdp", "hsdp"]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_equals_one_process(gloo_pool, name, mesh_shape):
    expected = train(name, 1, (1,))
    start = {n: p.detach() for n, p in make_model().named_parameters()}
    assert all((expected[n] - start[n]).abs().max() > 1e-3 for n in start), "all have moved"
    size = mesh_shape[0] * mesh_shape[-1] if len(mesh_shape) > 1 else mesh_shape[0]
    for values in gloo_pool.run(train, size, name, size, mesh_shape):
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=1e-4, atol=1e-5, msg=key)


def norms_of_layouts():
    """Norms and all-reduces of a sharded, an unevenly sharded, a replicated and a plain tensor."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = [torch.arange(12.0).reshape(4, 3), torch.ones(5, 2), torch.ones(1), torch.ones(7)]
    layouts = [[Shard(0)], [Shard(1)], [Shard(0)], [Replicate()]]
    parameters = [
        distribute_tensor(t, mesh, layout) for t, layout in zip(tensors, layouts, strict=True)
    ] + [torch.full((2,), 1e-15)]
    calls = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(0) or real(*args, **kwargs)
    try:
        norms = whole_norms([local(p) for p in parameters], parameters)
    finally:
        torch.distributed.all_reduce = real
    return norms, len(calls)


def test_norms_of_any_layout_in_one_all_reduce_each(gloo_pool):
    expected = torch.tensor([506.0, 10.0, 1.0, 7.0, 2e-30], dtype=torch.float64).sqrt()
    for norms, calls in gloo_pool.run(norms_of_layouts, 2):
        torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
        assert calls == 2, "one for Shard(0), one for Shard(1), none for what is whole"


def test_trainer_groups_decide_about_decay_and_dimensions_about_adaptation():
    model = nn.Module()
    model.cls_token = nn.Parameter(torch.ones(1, 1, 4))
    model.norm = nn.LayerNorm(4)
    model.head = nn.Linear(4, 4)
    for name, build in BUILDERS.items():
        copied = copy.deepcopy(model)
        optimizer = build(copied)
        set_hyperparameters(optimizer, lr=0.5, weight_decay=0.1)
        for p in copied.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved = (copied.cls_token - model.cls_token).detach()
        # |w| / |u| = 1 for a token of ones without decay.
        assert moved.unique().item() == pytest.approx(
            -0.5 * (0.001 if name == "lars" else 1.0), rel=1e-3
        )
        moved = (copied.norm.weight - model.norm.weight).detach()
        assert moved.unique().item() == pytest.approx(-0.5, rel=1e-5)


BAD = [
    (LARS, {"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
    (LARS, {"lr": float("inf")}, ValueError, "lr must be at least 0 and finite, got inf"),
    (LARS, {"lr": "1"}, TypeError, "lr must be a float, got str"),
    (LARS, {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
    (LARS, {"trust_coefficient": -1e-3}, ValueError, "trust_coefficient must be at least 0"),
    (LARS, {"weight_decay": None}, TypeError, "weight_decay must be a float, got NoneType"),
    (LARS, {"exclude_1d": 1}, TypeError, "exclude_1d must be a bool, got int"),
    (LAMB, {"lr": True}, TypeError, "lr must be a float, got bool"),
    (LAMB, {"betas": 0.9}, ValueError, "betas must be two numbers, got 0.9"),
    (LAMB, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    (LAMB, {"eps": -1e-8}, ValueError, "eps must be at least 0 and finite, got -1e-08"),
]


@pytest.mark.parametrize("cls, arguments, error, message", BAD)
def test_bad_arguments_are_named(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(make_parameters(), **{"lr": LR, **arguments})
    good = cls(make_parameters(), LR)
    with pytest.raises(error, match=message):
        good.add_param_group({"params": make_parameters(), **arguments})
    assert len(good.param_groups) == 1, "a refused group is not kept"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_are_refused(name):
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = OPTIMIZERS[name](table.parameters(), LR)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()
