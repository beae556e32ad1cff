"""Methods of two views without negatives: what they compute, alone and in several processes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.checks import (
    TINY_VIT,
    Case,
    build,
    check_all,
    check_processes,
    make_batch,
)

BYOL = Case("byol", {"hidden_dim": 12, "output_dim": 6}, accumulates=False)
SIMSIAM = Case(
    "simsiam",
    {"hidden_dim": 12, "predictor_dim": 5, "output_dim": 10},
    accumulates=False,
)
BARLOW_TWINS = Case(
    "barlow_twins",
    {"hidden_dim": 12, "output_dim": 6, "lambd": 0.1},
    accumulates=False,
)
VICREG = Case(
    "vicreg",
    {"hidden_dim": 12, "output_dim": 6},
    accumulates=False,
)
CASES = {"byol": BYOL, "simsiam": SIMSIAM, "barlow_twins": BARLOW_TWINS, "vicreg": VICREG}
VIT = {"model": "VisionTransformer", "model_args": TINY_VIT}
ALL = CASES | {
    "byol_batch_norm": replace(BYOL, model_args={"batch_norm": True}),
    "simsiam_batch_norm": replace(SIMSIAM, model_args={"batch_norm": True}),
    "byol_vit": replace(BYOL, **VIT),
    "vicreg_vit": replace(VICREG, **VIT),
}


@pytest.mark.parametrize("name", ALL)
def test_alone(name):
    check_all(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, ALL[name])


def byol_formula(method, views):
    """The squared distances of the unit vectors."""
    online = [normalize(method.predictor(method.student(v)), dim=1) for v in views]
    with torch.no_grad():
        target = [normalize(method.teacher(v), dim=1) for v in views]
    return sum((online[i] - target[1 - i]).square().sum(1).mean() for i in (0, 1))


def simsiam_formula(method, views):
    z = [method.projector(method.model(v)) for v in views]
    p = [normalize(method.predictor(x), dim=1) for x in z]
    fixed = [normalize(x.detach(), dim=1) for x in z]
    return -sum((p[i] * fixed[1 - i]).sum(1).mean() for i in (0, 1)) / 2


def barlow_twins_formula(method, views):
    z = [method.projector(method.model(v)) for v in views]
    z = [(x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in z]
    c = z[0].T @ z[1] / len(z[0])
    on = (1 - c.diagonal()).square().sum()
    return on + 0.1 * (c.square().sum() - c.diagonal().square().sum())


def vicreg_formula(method, views):
    z = [method.projector(method.model(v)) for v in views]
    n, d = z[0].shape
    loss = 25 * (z[0] - z[1]).square().sum() / (n * d)
    for x in z:
        loss = loss + 25 * (1 - (x.var(0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        centered = x - x.mean(0)
        cov = centered.T @ centered / (n - 1)
        loss = loss + (cov.square().sum() - cov.diagonal().square().sum()) / d
    return loss


FORMULAS = {
    "byol": byol_formula,
    "simsiam": simsiam_formula,
    "barlow_twins": barlow_twins_formula,
    "vicreg": vicreg_formula,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_is_its_formula(name):
    case = replace(CASES[name], model_args={"batch_norm": True})
    method = build(case).double()
    if name == "byol":
        # A teacher that differs from its student, as in the middle of a run.
        with torch.no_grad():
            for i, parameter in enumerate(method.teacher.parameters()):
                parameter.add_(
                    0.1 * torch.sin(torch.arange(parameter.numel()) + i).view_as(parameter)
                )
    batch = make_batch(case, dtype=torch.float64)
    loss = method(batch)["loss"]
    loss.backward()
    grads = {name: p.grad for name, p in method.named_parameters()}
    method.zero_grad()

    expected = FORMULAS[name](method, batch.views)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad)
        else:
            assert grads[name] is None


@pytest.mark.parametrize("name", CASES)
def test_views_go_through_by_themselves(name):
    """Batch statistics are those of one view."""
    case = replace(CASES[name], model_args={"batch_norm": True})
    method, batch = build(case), make_batch(case)
    features = method(batch)["features"]
    expected = torch.cat([method.model(view) for view in batch.views])
    torch.testing.assert_close(features, expected.detach())


def test_byol_judges_the_student_and_the_teacher_follows():
    method = build(BYOL)
    momentum = [s(0, 4) for s in method.schedules.values()]
    assert momentum == [0.996]
    before = [p.clone() for p in method.teacher.parameters()]
    method.before_step({"teacher_momentum": 0.75})
    method(make_batch(BYOL))["loss"].backward()
    torch.optim.SGD(method.student.parameters(), lr=0.5).step()
    method.after_step()
    pairs = zip(before, method.teacher.parameters(), method.student.parameters(), strict=True)
    moved = 0
    for old, teacher, student in pairs:
        torch.testing.assert_close(teacher, (0.75 * old + 0.25 * student).detach())
        moved += not torch.equal(old, teacher)
    assert moved > 2
    images = make_batch(BYOL).images
    assert torch.equal(method.features(images), method.student.encoder(images))
    assert not torch.equal(method.features(images), method.teacher.encoder(images))


def test_byol_is_0_where_the_prediction_is_right():
    method = build(BYOL)
    method.predictor = torch.nn.Identity()
    batch = make_batch(BYOL)
    batch.views = (batch.views[0], batch.views[0])
    assert abs(method(batch)["loss"].item()) < 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", [1, 3])
def test_two_views_are_wanted(name, number):
    with pytest.raises(ValueError, match=f"must make 2 views of a sample for {name}, got {number}"):
        build(replace(CASES[name], views=[{"number": number}]))


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_checked(name):
    with pytest.raises(ValueError, match="hidden_dim must be at least 1, got 0"):
        build(replace(CASES[name], args={"hidden_dim": 0}))
    with pytest.raises(ValueError, match=r"method.args of .* are hidden_dim.* got size"):
        build(replace(CASES[name], args={"size": 1}))


def test_the_scale_of_barlow_twins_is_a_factor():
    args = {"hidden_dim": 12, "output_dim": 6}
    losses = [
        build(Case("barlow_twins", args | more))(make_batch(Case("barlow_twins")))["loss"]
        for more in ({}, {"loss_scale": 0.5})
    ]
    torch.testing.assert_close(losses[1], losses[0] / 2)
