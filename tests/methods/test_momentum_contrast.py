"""MoCo, first to third: what they compute, alone and in several processes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from fastssl import functional as F
from fastssl.nn import SyncBatchNorm
from tests.methods.checks import (
    TINY_VIT,
    Case,
    build,
    check_all,
    check_processes,
    make_batch,
    part_of,
    run_steps,
)

V1 = "moco_v1"
V2 = "moco_v2"
V3 = "moco_v3"
VIT = {"model": "VisionTransformer", "model_args": TINY_VIT}
BATCH_NORM = {"model_args": {"batch_norm": True}, "accumulates": False}
# Not a multiple of the batch, and filled within the steps.
MOCO = {"hidden_dim": 12, "output_dim": 6, "queue_size": 21}
SMALL = {"hidden_dim": 12, "output_dim": 6}
CASES = {
    "moco": Case(V2, MOCO),
    "moco_vit": Case(V2, MOCO, **VIT),
    "moco_batch_norm": Case(V2, MOCO, **BATCH_NORM),
    "moco_v1": Case(V1, {"output_dim": 6, "queue_size": 21}),
    "moco_shuffled": Case(V2, MOCO | {"shuffle_bn": True}),
    "moco_v3": Case(V3, SMALL, accumulates=False),
    "moco_v3_batch_norm": Case(
        V3, SMALL | {"num_layers": 2, "predictor_last_norm": False}, **BATCH_NORM
    ),
    "moco_v3_vit": Case(V3, SMALL | {"freeze_patch_embed": True}, accumulates=False, **VIT),
}


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def stepped(case, steps=2):
    """A method in float64 whose teacher is not its student any more, and the next batch."""
    method = build(case).double()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        method.before_step({"teacher_momentum": 0.5})
        method(make_batch(case, step, torch.float64))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
    return method, make_batch(case, steps, torch.float64)


def assert_same_step(method, loss, expected):
    """The same value and the same gradients."""
    torch.testing.assert_close(loss, expected)
    trained = [p for p in method.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    )


@pytest.mark.parametrize("name", ["moco", "moco_v1"])
def test_moco_is_its_formula(name):
    """-log(exp(q . k / t) / (exp(q . k / t) + sum over the queue)), t as in the papers."""
    method, batch = stepped(CASES[name])
    loss = method(batch)["loss"]
    temperature = {"moco": 0.2, "moco_v1": 0.07}[name]
    queries = normalize(method.student(batch.views[0]), dim=1)
    with torch.no_grad():
        keys = normalize(method.teacher(batch.views[1]), dim=1)
    positive = ((queries * keys).sum(1) / temperature).exp()
    negative = (queries @ method.loss.queue.T / temperature).exp().sum(1)
    assert_same_step(method, loss, -(positive / (positive + negative)).log().mean())


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_v3_is_its_formula(temperature):
    """2 t times the cross-entropies of both orders, no gradient through the keys."""
    case = replace(CASES["moco_v3"], args=SMALL | {"temperature": temperature})
    method, batch = stepped(case)
    loss = method(batch)["loss"]
    queries = [normalize(method.predictor(method.student(x)), dim=1) for x in batch.views]
    with torch.no_grad():
        keys = [normalize(method.teacher(x), dim=1) for x in batch.views]
    own = torch.arange(len(batch))
    expected = sum(
        2 * temperature * cross_entropy(queries[i] @ keys[1 - i].T / temperature, own)
        for i in range(2)
    )
    assert_same_step(method, loss, expected)


def test_queue_holds_the_latest_keys_in_order():
    case = CASES["moco"]
    method, pushed = build(case).double(), []
    for step in range(3):
        method.before_step({"teacher_momentum": 0.999})
        batch = make_batch(case, step, torch.float64)
        # Micro-batches: the queue waits for the step.
        before = method.loss.queue.clone()
        for part in range(2):
            method(part_of(batch, part, 2))
        assert torch.equal(method.loss.queue, before)
        pushed.append(normalize(method.teacher(batch.views[1]), dim=1))
        method.after_step()
    keys = torch.cat(pushed)  # 24 of them for 21 places
    assert method.loss.queue_ptr.item() == 3
    torch.testing.assert_close(method.loss.queue, torch.cat([keys[21:], keys[3:21]]))


@pytest.mark.parametrize(
    ("name", "momenta"), [("moco", (0.999, 0.999, 0.999)), ("moco_v3", (0.99, 0.995, 1.0))]
)
def test_teacher_follows_by_the_papers_momentum(name, momenta):
    method = build(CASES[name])
    schedule = method.schedules["teacher_momentum"]
    assert [schedule(step, 100) for step in (0, 50, 100)] == pytest.approx(list(momenta))
    teacher, student = method.teacher.encoder.fc, method.student.encoder.fc
    before = teacher.weight.clone()
    student.weight.data.add_(1.0)
    method.before_step({"teacher_momentum": momenta[0]})
    method.after_step()
    torch.testing.assert_close(teacher.weight, torch.lerp(student.weight, before, momenta[0]))


def test_head_and_model():
    first, second = build(CASES["moco_v1"]), build(CASES["moco"])
    assert [type(layer) for layer in first.student.head] == [nn.Linear]
    assert [type(layer) for layer in second.student.head] == [nn.Linear, nn.ReLU, nn.Linear]
    for method in (first, second, build(CASES["moco_v3"])):
        assert method.model is method.student.encoder
        assert all(p.requires_grad for p in method.model.parameters())
    assert [view.get("blur", 0) for view in (*type(first).views, *type(second).views)] == [0, 0.5]


def test_frozen_patch_embedding_does_not_move():
    method, _ = stepped(CASES["moco_v3_vit"])
    fresh = build(CASES["moco_v3_vit"]).double()
    for key, value in fresh.model.state_dict().items():
        moved = not torch.equal(method.model.state_dict()[key], value)
        assert moved != key.startswith("patch_embed."), key
    assert build(
        replace(CASES["moco_v3_vit"], args=SMALL)
    ).model.patch_embed.proj.weight.requires_grad


SHUFFLED = Case(V2, MOCO | {"shuffle_bn": True}, **BATCH_NORM)


def keys_of_ranks(epoch=0):
    """This rank's keys, with batch normalisation converted as the trainer does."""
    method = SyncBatchNorm.convert_sync_batchnorm(build(SHUFFLED).double())
    batch = replace(make_batch(SHUFFLED, dtype=torch.float64), epoch=epoch)
    return method.keys(part_of(batch, dist.get_rank(), dist.get_world_size()))


def test_shuffled_keys_are_normalised_by_process_and_put_back(gloo_pool):
    batch = make_batch(SHUFFLED, dtype=torch.float64)
    order = F.keyed_uniform(batch.index, 1, seed=5, stream=F.STREAM_METHOD)[:, 0].argsort()
    # Each process encodes some of the other's images.
    assert all(0 < (part < 4).sum() < 4 for part in order.chunk(2))
    expected = torch.empty(8, 6, dtype=torch.float64)
    for part in order.chunk(2):
        with torch.no_grad():
            expected[part] = build(SHUFFLED).double().teacher(batch.views[1][part])
    keys = torch.cat(gloo_pool.run(keys_of_ranks, 2))
    torch.testing.assert_close(keys, expected)
    with torch.no_grad():
        unshuffled = build(SHUFFLED).double().teacher(batch.views[1])
    assert (keys - unshuffled).abs().max() > 1e-3


def test_shuffling_is_keyed_by_epoch(gloo_pool):
    first, again, other = (torch.cat(gloo_pool.run(keys_of_ranks, 2, e)) for e in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


def test_shuffling_changes_nothing_alone():
    losses, state = run_steps(SHUFFLED)
    others, other = run_steps(replace(SHUFFLED, args=MOCO))
    assert losses == others
    assert all(torch.equal(other[key], value) for key, value in state.items())


def train_shuffled():
    """Losses and state of a rank; the teacher's own statistics apart."""
    losses, state = run_steps(SHUFFLED)
    return losses, {k: v for k, v in state.items() if "running" not in k}


def test_shuffled_training_keeps_the_processes_alike(gloo_pool):
    (_, first), (_, second) = gloo_pool.run(train_shuffled, 2)
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("name", ["moco", "moco_v3"])
@pytest.mark.parametrize("number", [1, 3])
def test_two_views_are_wanted(name, number):
    with pytest.raises(ValueError, match=f"must make 2 views of a sample for {name}, got {number}"):
        build(replace(CASES[name], views=[{"number": number}]))


def test_freezing_wants_a_patch_embedding():
    case = replace(CASES["moco_v3"], args={"freeze_patch_embed": True})
    with pytest.raises(ValueError, match=r"without patch_embed, got True for a TinyEncoder"):
        build(case)


def test_teacher_is_a_copy():
    method = build(CASES["moco"])
    assert method.student.state_dict().keys() == method.teacher.state_dict().keys()
    for key, value in method.student.state_dict().items():
        other = method.teacher.state_dict()[key]
        assert torch.equal(value, other) and value.data_ptr() != other.data_ptr()
