"""The teacher's average: pairing, buffers, dtypes, and shards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastssl.optim import EMA


class Network(nn.Module):
    """Parameters, batch statistics, a counter, a weight used twice."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3, bias=False)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("optional", None)

    def forward(self, x):
        return self.head(self.body(x)) + self.tied(self.body(x))


def tensors(module):
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def test_parameters_and_statistics_are_averaged_and_counters_copied():
    teacher, student = Network(0), Network(1)
    student(torch.randn(8, 6))
    ema = EMA(teacher, student)
    before, theirs = tensors(teacher), tensors(student)
    ema.step(0.75)
    for name, value in tensors(teacher).items():
        expected = 0.75 * before[name] + 0.25 * theirs[name]
        if not value.is_floating_point():
            expected = theirs[name]
        torch.testing.assert_close(value, expected, msg=name)
    assert theirs["body.1.num_batches_tracked"] == 2
    assert all(torch.equal(v, theirs[n]) for n, v in tensors(student).items()), "not the student"
    ema.step(torch.tensor(0.0))
    assert all(torch.equal(v, theirs[n]) for n, v in tensors(teacher).items()), "0 copies"


def test_buffers_on_request():
    student = Network(1)
    student(torch.randn(8, 6))
    for buffers in ("copy", "keep"):
        teacher = Network(0)
        before = tensors(teacher)
        EMA(teacher, student, buffers=buffers).step(0.5)
        source = tensors(student) if buffers == "copy" else before
        for name, _ in teacher.named_buffers():
            assert torch.equal(teacher.get_buffer(name), source[name]), name
        assert not torch.equal(teacher.head.weight, before["head.weight"])


def test_many_steps_are_the_geometric_sum():
    teacher, student = nn.Linear(4, 4), nn.Linear(4, 4)
    ema = EMA(teacher, student)
    expected = teacher.weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            student.weight.add_(0.1)
        ema.step(momentum := 0.9 + 0.005 * step)
        expected = momentum * expected + (1 - momentum) * student.weight.detach().double()
    torch.testing.assert_close(teacher.weight.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_float32_teacher_of_a_bfloat16_student():
    teacher, student = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()
    before = teacher.weight.detach().clone()
    EMA(teacher, student).step(0.999)
    expected = before + 0.001 * (student.weight.detach().float() - before)
    assert teacher.weight.dtype == torch.float32
    torch.testing.assert_close(teacher.weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_the_teacher_requires_no_gradient_and_the_student_keeps_its_own():
    teacher, student = Network(0), Network(1)
    EMA(teacher, student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_a_compiled_student_has_the_same_names():
    teacher, student = Network(0), Network(1)
    EMA(teacher, torch.compile(student)).step(0.0)
    assert torch.equal(teacher.head.weight, student.head.weight)


def test_tensors_put_in_place_of_others_are_followed():
    teacher, student = Network(0), Network(1)
    ema = EMA(teacher, student)
    teacher.load_state_dict(tensors(Network(2)), assign=True)
    student.load_state_dict(tensors(Network(3)), assign=True)
    ema.step(0.0)
    assert torch.equal(teacher.head.weight, Network(3).head.weight)


def test_mismatches_are_named():
    student = Network(1)
    narrow, deeper, shared = Network(0), Network(0), Network(0)
    narrow.head = nn.Linear(5, 2, bias=False)
    deeper.extra = nn.Linear(2, 2)
    shared.head.weight = student.head.weight
    cases = [
        (narrow, student, r"parameter head.weight of one shape, got \[2, 5\] and \[3, 5\]"),
        (deeper, student, "same names, got extra.weight, extra.bias in the teacher only"),
        (student, deeper, "same names, got extra.weight, extra.bias in the student only"),
        (shared, student, "tensors of its own, got the student's as parameter head.weight"),
        (student, student, "tensors of its own, got the student's as parameter body.0.weight"),
    ]
    for teacher, other, message in cases:
        with pytest.raises(ValueError, match=message):
            EMA(teacher, other)
    assert all(p.requires_grad for p in student.parameters()), "a refusal changes nothing"
    with pytest.raises(ValueError, match="buffers must be one of average, copy, keep, got 'x'"):
        EMA(Network(0), student, buffers="x")
    with pytest.raises(TypeError, match="student must be a Module, got OrderedDict"):
        EMA(Network(0), student.state_dict())
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        EMA(Network(0), student).step(2)


def make_network():
    torch.manual_seed(3)
    # Two ranks get unequal shards of 5 and 3 rows, and one of them none of the bias [1].
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = make_network()
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x):
        return (self.student(x) - self.teacher(x + 1) - 1).square().mean()


def train(world_size, as_one_module):
    """A student that learns from its teacher and the other way round; the parameters of both."""
    both = Pair()
    teacher, student = both.teacher, both.student
    rank = 0
    if world_size > 1:
        rank = torch.distributed.get_rank()
        mesh = init_device_mesh("cpu", (world_size,))
        for module in (teacher, student):
            fully_shard(module[0], mesh=mesh)
            if not as_one_module:
                fully_shard(module, mesh=mesh)
        if as_one_module:
            fully_shard(both, mesh=mesh)
    ema = EMA(teacher, student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    x = torch.linspace(-1, 1, 8 * 6).reshape(8, 6).sin()
    for _ in range(4):
        both(x.chunk(world_size)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(0.7)
    if world_size > 1:
        assert all(isinstance(p, DTensor) for p in both.parameters())
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in both.parameters()]


@pytest.mark.parametrize("as_one_module", [False, True])
def test_sharded_equals_one_process(gloo_pool, as_one_module):
    expected = train(1, as_one_module)
    for values in gloo_pool.run(train, 2, 2, as_one_module):
        for value, one in zip(values, expected, strict=True):
            torch.testing.assert_close(value.detach(), one.detach(), rtol=1e-5, atol=1e-6)


def teacher_alone_is_whole():
    mesh = init_device_mesh("cpu", (2,))
    teacher, student = make_network(), make_network()
    fully_shard(student, mesh=mesh)
    try:
        EMA(teacher, student)
    except ValueError as error:
        return str(error)


def test_one_sharded_and_the_other_not_is_refused(gloo_pool):
    for message in gloo_pool.run(teacher_alone_is_whole, 2):
        assert message.endswith("got parameter 0.weight sharded in the student only")
