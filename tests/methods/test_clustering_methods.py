"""Methods of clusters: what they compute, alone and in several processes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.methods.clustering import nearest
from fastssl.methods.common import encode
from fastssl.methods.deepcluster_v2 import spherical_kmeans
from tests.methods.checks import (
    TINY_VIT,
    Case,
    build,
    check_all,
    check_processes,
    make_batch,
)

CROPS = ({"number": 2}, {"number": 2, "size": 8})
SWAV = Case(
    "swav",
    {"hidden_dim": 12, "output_dim": 6, "n_prototypes": 10, "freeze_prototypes_steps": 0},
    views=CROPS,
    accumulates=False,
)
QUEUE = {"queue_length": 16, "epoch_queue_starts": 0}
DEEPCLUSTER = Case(
    "deepcluster_v2",
    {"hidden_dim": 12, "output_dim": 6, "n_prototypes": 5, "num_heads": 2},
    views=CROPS,
    accumulates=False,
    num_steps=8,
)
SELA = replace(DEEPCLUSTER, name="sela")
# Position embeddings are resized to small crops in float32.
VIT = {"model": "VisionTransformer", "model_args": TINY_VIT, "atol": 1e-7}
CASES = {
    "swav": SWAV,
    "swav_queue": replace(SWAV, args=SWAV.args | QUEUE),
    "swav_frozen": replace(SWAV, args=SWAV.args | {"freeze_prototypes_steps": 2}),
    "swav_batch_norm": replace(SWAV, model_args={"batch_norm": True}),
    "swav_vit": replace(SWAV, **VIT),
    "deepcluster_v2": DEEPCLUSTER,
    "deepcluster_v2_batch_norm": replace(DEEPCLUSTER, model_args={"batch_norm": True}),
    # Three samples of every epoch do not fill a batch.
    "deepcluster_v2_rest": replace(DEEPCLUSTER, num_samples=27),
    "sela": SELA,
    "sela_vit": replace(SELA, **VIT, num_steps=4),
    "sela_rest": replace(SELA, num_samples=27),
}
OFFLINE = {"deepcluster_v2": DEEPCLUSTER, "sela": SELA}


@pytest.mark.parametrize("name", [name for name in CASES if name != "swav_frozen"])
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def step(method, case, number, lr=0.1):
    """A step on the batch of that number; its outputs."""
    dtype = next(method.parameters()).dtype
    method.before_step({})
    outputs = method(make_batch(case, number, dtype))
    outputs["loss"].backward()
    torch.optim.SGD(method.parameters(), lr=lr).step()
    method.zero_grad()
    method.after_step()
    return outputs


def embed(method, batch):
    """[V, B, D] of length 1."""
    z = normalize(method.head(encode(method.model, batch.views)), dim=1)
    return z.unflatten(0, (len(batch.views), -1))


def same_as_formula(method, batch, formula):
    """Loss and gradients of forward are those of `formula(method, batch)`."""
    loss = method(batch)["loss"]
    loss.backward()
    grads = {name: p.grad for name, p in method.named_parameters()}
    method.zero_grad()
    expected = formula(method, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def sinkhorn(scores, epsilon, num_iters=3):
    """As in the paper: prototypes to 1 / K, images to 1 / B, by turns."""
    q = (scores.detach() / epsilon).exp()
    for _ in range(num_iters):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swav_formula(method, batch):
    weight = method.prototypes.weight
    scores = [z @ weight.T for z in embed(method, batch)]
    queue = method.loss.queue
    pairs = []
    for t in (0, 1):
        rows = scores[t]
        if queue is not None and queue[t, -1].any():
            rows = torch.cat([rows, queue[t] @ weight.T])
        q = sinkhorn(rows, 0.05)[: len(batch)]
        pairs += [
            -(q * (p / 0.1).log_softmax(1)).sum(1).mean() for s, p in enumerate(scores) if s != t
        ]
    assert len(pairs) == 6
    return sum(pairs) / 6


@pytest.mark.parametrize("name", ["swav", "swav_queue"])
def test_swav_is_its_formula(name):
    case = CASES[name]
    method = build(case).double()
    for number in range(3):
        step(method, case, number)
    assert method.loss.queue is None or method.loss.queue[:, -1].any()
    same_as_formula(method, make_batch(case, 3, torch.float64), swav_formula)


def test_swav_prototypes_have_length_1():
    method = build(SWAV)
    start = method.prototypes.weight.clone()
    for number in range(2):
        lengths = method.prototypes.weight.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        step(method, SWAV, number, lr=5.0)
    assert (method.prototypes.weight - start).abs().max() > 1e-3


def test_swav_prototypes_are_frozen_at_first():
    case = CASES["swav_frozen"]
    method, twin = build(case), build(SWAV)
    start = method.prototypes.weight.clone()
    for number in range(2):
        method(make_batch(case, number))["loss"].backward()
        assert method.prototypes.weight.grad is None
        assert all(p.grad.any() for p in method.model.parameters())
        step(method, case, number)
        torch.testing.assert_close(method.prototypes.weight, start)
    method.load_state_dict(twin.state_dict())
    # From then on the loss is that of the prototypes that learn, as it was before.
    step(method, case, 2)
    step(twin, case, 2)
    assert torch.equal(method.prototypes.weight, twin.prototypes.weight)
    assert not torch.allclose(method.prototypes.weight, start)


def test_swav_queue_fills_from_its_epoch_on():
    case = replace(SWAV, args=SWAV.args | {"queue_length": 16, "epoch_queue_starts": 1})
    method = build(case)
    for number in range(3):
        step(method, case, number)
    assert not method.loss.queue.any()
    for number in (3, 4):
        batch = make_batch(case, number)
        expected = embed(method, batch)[:2].detach()
        step(method, case, number)
        torch.testing.assert_close(method.loss.queue[:, :8], expected)
    assert method.loss.queue[:, 8:].any(dim=2).all()


def offline_formula(method, batch):
    """The cross-entropy with the assignments, one image, view and head at a time."""
    z = embed(method, batch)
    prototypes = method.weight().unflatten(0, (method.num_heads, -1))
    total = 0.0
    for head, assignments in enumerate(method.assignments):
        for image, sample in enumerate(batch.index):
            if assignments[sample] < 0:
                continue
            for view in z:
                scores = (view[image] @ prototypes[head].T / 0.1).log_softmax(0)
                total = total - scores[assignments[sample]]
    return total / (method.num_heads * z.shape[0] * z.shape[1])


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_methods_are_their_formula(name):
    case = OFFLINE[name]
    method = build(case).double()
    for number in range(3):
        step(method, case, number)
    assert (method.assignments >= 0).all()
    method.assignments[:, 2] = -1
    same_as_formula(method, make_batch(case, 3, torch.float64), offline_formula)


@pytest.mark.parametrize("name", OFFLINE)
def test_first_epoch_assigns_the_batch(name):
    def formula(method, batch):
        embedding = normalize(embed(method, batch)[:2].detach().mean(0), dim=1)
        for head, prototypes in enumerate(method.weight().chunk(2)):
            q = sinkhorn(embedding @ prototypes.T, 0.05)
            method.assignments[head, batch.index] = q.argmax(1)
        return offline_formula(method, batch)

    method = build(OFFLINE[name]).double()
    batch = make_batch(OFFLINE[name], 0, torch.float64)
    same_as_formula(method, batch, formula)
    assert method.assignments[0, :8].unique().numel() > 2


@pytest.mark.parametrize("name", OFFLINE)
def test_memory_holds_the_mean_of_the_assigned_crops(name):
    case = replace(OFFLINE[name], args=OFFLINE[name].args | {"crops_for_assign": [0, 3]})
    method = build(case)
    batch = make_batch(case, 1)
    expected = embed(method, batch)[[0, 3]].detach().mean(0)
    step(method, case, 1)
    torch.testing.assert_close(method.memory.bank[8:16], normalize(expected, dim=1))
    assert not method.memory.bank[:8].any() and not method.memory.bank[16:].any()


@pytest.mark.parametrize("name", OFFLINE)
def test_assignments_are_made_where_an_epoch_ends(name):
    case = OFFLINE[name]
    method = build(case)
    history = []
    for number in range(6):
        step(method, case, number, lr=1.0)
        history.append(method.assignments.clone())
    assert (history[0] == -1).all() and torch.equal(history[1], history[0])
    assert (history[2] >= 0).all() and (history[2] < 5).all()
    assert torch.equal(history[3], history[2]) and torch.equal(history[4], history[2])
    assert not torch.equal(history[5], history[2])
    assert not torch.equal(history[2][0], history[2][1]), "heads do not differ"


@pytest.mark.parametrize("name", OFFLINE)
def test_an_epoch_may_end_with_a_skipped_step(name):
    case = OFFLINE[name]
    method = build(case)
    for number in range(2):
        step(method, case, number)
    method(make_batch(case, 2))
    method.skip_step()
    assert (method.assignments[:, :16] >= 0).all()
    assert (method.assignments[:, 16:] == -1).all()
    assert not method.memory.bank[16:].any()


@pytest.mark.parametrize("name", ["deepcluster_v2_rest", "sela_rest"])
def test_samples_that_have_not_come_by_do_not_count(name):
    case = CASES[name]
    method = build(case).double()
    for number in range(3):
        step(method, case, number)
    assert (method.assignments[:, :24] >= 0).all() and (method.assignments[:, 24:] == -1).all()
    batch = make_batch(case, 3, torch.float64)
    batch.index = torch.arange(19, 27)
    same_as_formula(method, batch, offline_formula)
    batch.index = torch.arange(24, 27).repeat(3)[:8]
    assert method(batch)["loss"] == 0


def some_have_come_by(case, rows):
    """A method that has seen only those samples, which are alike."""
    method = build(case).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(rows), 6, generator=generator, dtype=torch.float64)
    method.memory.bank[rows] = normalize(1.0 + 0.5 * noise, dim=1)
    with torch.no_grad():
        method.assign(1)
    return method


def test_deepcluster_starts_at_samples_that_have_come_by():
    rows = torch.tensor([3, 7, 8, 15, 20])
    method = some_have_come_by(DEEPCLUSTER, rows)
    for centroids, assignments in zip(method.centroids.chunk(2), method.assignments, strict=True):
        assert assignments[rows].unique().numel() == 5
        torch.testing.assert_close(centroids[assignments[rows]], method.memory.bank[rows])


def test_sela_shares_out_the_samples_that_have_come_by():
    rows = torch.arange(0, 24, 3)
    method = some_have_come_by(SELA, rows)
    for prototypes, assignments in zip(method.weight().chunk(2), method.assignments, strict=True):
        q = sinkhorn(method.memory.bank[rows] @ prototypes.T, 0.05, 100)
        assert torch.equal(assignments[rows], q.argmax(1))


def test_deepcluster_centroids_are_the_means_of_their_members():
    case = replace(DEEPCLUSTER, args=DEEPCLUSTER.args | {"num_iters": 50})
    method = build(case).double()
    start = method.centroids.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones_like(start[:, 0]))
    for number in range(3):
        step(method, case, number)
    for centroids, assignments in zip(method.centroids.chunk(2), method.assignments, strict=True):
        for k in assignments.unique():
            mean = normalize(method.memory.bank[assignments == k].mean(0), dim=0)
            torch.testing.assert_close(centroids[k], mean)
        assert assignments.unique().numel() > 2
    assert "centroids" in method.state_dict()
    assert "centroids" not in dict(method.named_parameters())


def test_spherical_kmeans():
    """Two bundles are found from a bad start; who has no members stays, who is 0 is nobody's."""
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 2.1, 2.2], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    points = torch.cat([points, torch.zeros(1, 2, dtype=torch.float64)])
    lonely = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    initial = torch.cat([points[:1], points[2:3], lonely])
    centroids = spherical_kmeans(points, initial, 10)
    expected = torch.tensor([0.1, 2.1], dtype=torch.float64)
    expected = torch.stack([expected.cos(), expected.sin()], dim=1)
    torch.testing.assert_close(centroids, torch.cat([expected, lonely]))
    assert nearest(points, centroids).tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert torch.equal(spherical_kmeans(points, centroids, 1)[2], lonely[0])


def test_long_data_are_taken_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    points = normalize(torch.randn(50, 4, generator=generator, dtype=torch.float64), dim=1)
    whole = spherical_kmeans(points, points[:7], 5), nearest(points, points[:7])
    monkeypatch.setattr("fastssl.methods.clustering._CHUNK", 60)
    parts = spherical_kmeans(points, points[:7], 5), nearest(points, points[:7])
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_sela_clusters_are_of_equal_size():
    method = build(SELA).double()
    for number in range(3):
        step(method, SELA, number)
    for prototypes, assignments in zip(method.weight().chunk(2), method.assignments, strict=True):
        scores = (method.memory.bank @ prototypes.T).detach()
        q = sinkhorn(scores, 0.05, 100)
        torch.testing.assert_close(q.sum(0), torch.full_like(q[0], 24 / 5), rtol=1e-2, atol=0)
        assert torch.equal(assignments, q.argmax(1))
        sizes = assignments.bincount(minlength=5)
        assert sizes.min() >= 3 and sizes.max() <= 7
        # Without equipartition they are not.
        assert scores.argmax(1).bincount(minlength=5).max() > 7


def test_assignments_survive_an_interruption_bit_by_bit():
    """Each step of a run is made by a method that was built anew from the last one's state."""
    for case in OFFLINE.values():
        through = build(case)
        resumed = build(case)
        for number in range(7):
            step(through, case, number)
            step(resumed, case, number)
            state = {key: value.clone() for key, value in resumed.state_dict().items()}
            resumed = build(case, seed=5)
            resumed.load_state_dict(state)
        for key, value in through.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", OFFLINE)
def test_another_seed_gives_other_clusters(name):
    losses = []
    for seed in (5, 6):
        method = build(OFFLINE[name], seed=seed)
        losses.append(step(method, OFFLINE[name], 0)["loss"].item())
    # SeLA's prototypes are parameters, which the global generator makes.
    assert (losses[0] != losses[1]) == (name == "deepcluster_v2")


@pytest.mark.parametrize("name", ["swav", "deepcluster_v2", "sela"])
def test_training_beats_the_uniform_prediction(name):
    case = replace(CASES[name], num_steps=12)
    method = build(case)
    values = [step(method, case, number)["loss_over_log_k"].item() for number in range(12)]
    assert sum(values[-3:]) / 3 < 0.95 * sum(values[:3]) / 3


@pytest.mark.parametrize(
    ("case", "args", "message"),
    [
        (SWAV, {"freeze_prototypes_steps": -1}, "freeze_prototypes_steps must be at least 0"),
        (SWAV, {"epoch_queue_starts": -1}, "epoch_queue_starts must be at least 0, got -1"),
        (SWAV, {"crops_for_assign": [4]}, "crops_for_assign must be at least 0 and at most 3"),
        (DEEPCLUSTER, {"n_prototypes": 25}, "n_prototypes must be at most the 24 samples, got 25"),
        (DEEPCLUSTER, {"num_heads": 0}, "num_heads must be at least 1, got 0"),
        (DEEPCLUSTER, {"num_iters": 0}, "num_iters must be at least 1, got 0"),
        (DEEPCLUSTER, {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        (SELA, {"crops_for_assign": []}, "crops_for_assign must be at least one view, got none"),
        (SELA, {"crops_for_assign": [4]}, "crops_for_assign must be at least 0 and at most 3"),
        (SELA, {"epsilon": -1.0}, "epsilon must be positive, got -1.0"),
        (SELA, {"sinkhorn_iterations": 0}, "sinkhorn_iterations must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(case, args, message):
    with pytest.raises(ValueError, match=message):
        build(replace(case, args=dict(case.args) | args))


def test_swav_wants_two_views():
    with pytest.raises(ValueError, match="must make at least 2 views of a sample for swav, got 1"):
        build(replace(SWAV, views=[{}]))
