"""Rotation, context prediction and exemplars: what they ask, alone and in several processes."""

import pytest
import torch
from torch.nn.functional import interpolate

from fastssl.methods import make_views, method_class
from tests.methods.checks import TINY_VIT, Case, build, check_all, check_processes, make_batch

VIT = {"model": "VisionTransformer", "model_args": TINY_VIT}
BATCH_NORM = {"model_args": {"batch_norm": True}, "accumulates": False}
NAMES = {
    "rotation": "rotation",
    "context": "context_prediction",
    "exemplar": "exemplar",
}
# A grid of 3 * 4 + 2 * 2 + 2 * 1 = 18 pixels in views of 24.
SMALL = {"patch_size": 4, "gap": 2, "jitter": 1, "hidden_dim": 12}
ROTATION = Case(NAMES["rotation"])
CONTEXT = Case(NAMES["context"], SMALL, image_size=24)
EXEMPLAR = Case(NAMES["exemplar"])
CASES = {
    "rotation": ROTATION,
    "rotation_keyed": Case(NAMES["rotation"], {"all_rotations": False}),
    "rotation_vit": Case(NAMES["rotation"], **VIT),
    "rotation_batch_norm": Case(NAMES["rotation"], **BATCH_NORM),
    "context": CONTEXT,
    "context_project": Case(NAMES["context"], SMALL | {"color": "project"}, image_size=(20, 24)),
    "context_vit": Case(NAMES["context"], SMALL | {"patch_size": 8}, image_size=32, **VIT),
    "context_batch_norm": Case(NAMES["context"], SMALL, image_size=24, **BATCH_NORM),
    "exemplar": EXEMPLAR,
    "exemplar_shared": Case(NAMES["exemplar"], {"num_classes": 5}, views=[{"number": 2}]),
    "exemplar_vit": Case(NAMES["exemplar"], **VIT),
    "exemplar_batch_norm": Case(NAMES["exemplar"], **BATCH_NORM),
}


def mean_surprise(logits, classes):
    """The mean of -log softmax(logits)[class], written out."""
    total = 0.0
    for row, c in zip(logits, classes, strict=True):
        total = total + row.exp().sum().log() - row[c]
    return total / len(logits)


def assert_same_step(method, batch, formula):
    loss = method(batch)["loss"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()
    expected = formula()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


def double(name, **changes):
    case = CASES[name]
    return build(case, **changes).double(), make_batch(case, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


@pytest.mark.parametrize("name", ["rotation", "rotation_keyed"])
def test_rotation_is_its_formula(name):
    method, batch = double(name)
    _, drawn = method.rotated(batch)

    def turn(image, quarters):  # anticlockwise, by what a pixel's place becomes
        for _ in range(quarters):
            image = image.transpose(1, 2).flip(1)
        return image

    def formula():
        pairs = [(b, k) for k in range(4) for b in range(8)]
        if name == "rotation_keyed":
            pairs = list(enumerate(drawn.tolist()))
        images = torch.stack([turn(batch.images[b], k) for b, k in pairs])
        return mean_surprise(method.head(method.model(images)), [k for _, k in pairs])

    assert_same_step(method, batch, formula)


def test_rotation_turns_anticlockwise():
    method, batch = double("rotation")
    images, turns = method.rotated(batch)
    once = images[turns == 1]
    assert torch.equal(once[:, :, 0, 0], batch.images[:, :, 0, -1])  # right goes up
    assert torch.equal(images[turns == 0], batch.images)


def test_rotation_is_drawn_by_sample_and_epoch():
    method, batch = double("rotation_keyed")
    batch.index = torch.arange(8) + 40
    turns = method.rotated(batch)[1]
    batch.index = batch.index.flip(0)
    assert torch.equal(method.rotated(batch)[1], turns.flip(0))
    batch.epoch = 1
    assert not torch.equal(method.rotated(batch)[1], turns.flip(0))
    batch.index = torch.arange(4000)
    batch.views = (batch.images[:1, :, :1, :1].expand(4000, -1, -1, -1),)
    counts = method.rotated(batch)[1].bincount(minlength=4)
    assert counts.sum() == 4000 and ((counts - 1000).abs() < 120).all()


@pytest.mark.parametrize("color", ["none", "drop", "project"])
def test_context_prediction_is_its_formula(color):
    method, batch = double("context", args=SMALL | {"color": color})
    with torch.no_grad():
        neighbour, patches = method.patches(batch)

    def formula():
        first, second = method.model(patches[:, 0]), method.model(patches[:, 1])
        hidden = torch.cat([first, second], 1) @ method.head[0].weight.T + method.head[0].bias
        logits = hidden.clamp(min=0) @ method.head[2].weight.T + method.head[2].bias
        return mean_surprise(logits, neighbour.tolist())

    assert_same_step(method, batch, formula)


def coordinates(method, batch, size):
    """A batch of many samples whose channels are a pixel's row, its column and 0."""
    height, width = size
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([row, column, torch.zeros_like(row)]).double()
    batch.index = torch.arange(3000)
    batch.views = (image.expand(3000, -1, -1, -1),)
    return batch


def test_context_prediction_cuts_what_it_says():
    """The label is the direction, patches are gap and twice the jitter apart, all places occur."""
    method, batch = double("context", args=SMALL | {"color": "none"})
    neighbour, patches = method.patches(coordinates(method, batch, (24, 30)))
    inside = torch.arange(4.0, dtype=torch.float64)
    corners = patches[:, :, :2, 0, 0]
    rows, columns = corners[:, :, :, None, None].unbind(2)
    assert torch.equal(patches[:, :, 0], rows + inside[:, None].expand(4, 4))
    assert torch.equal(patches[:, :, 1], columns + inside.expand(4, 4))
    offset = corners[:, 1] - corners[:, 0]
    around = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    exact = torch.tensor(around).double()[neighbour] * 6
    shift = offset - exact
    assert sorted(set(shift.flatten().tolist())) == [-2, -1, 0, 1, 2]
    for place, side in ((0, 24), (1, 30)):
        places = set(corners[:, :, place].flatten().tolist())
        assert places == set(range(side - 3))
        # The middle of a grid of 16 pixels and a shift of 0 to 2.
        assert set(corners[:, 0, place].tolist()) == set(range(6, side - 18 + 6 + 3))
    counts = neighbour.bincount(minlength=8)
    assert ((counts - 375).abs() < 80).all()


def test_the_first_patch_does_not_tell_the_answer():
    method, batch = double("context", args=SMALL | {"color": "none"})
    neighbour, patches = method.patches(coordinates(method, batch, (24, 24)))
    rows = patches[:, 0, 0, 0, 0]
    means = torch.stack([rows[neighbour == n].mean() for n in range(8)])
    assert (means - rows.mean()).abs().max() < 0.6  # of a standard deviation of 2.2, by 375 each


def test_context_prediction_is_keyed():
    method, batch = double("context")
    neighbour, patches = method.patches(batch)
    batch.index, batch.views = batch.index.flip(0), (batch.images.flip(0),)
    other, flipped = method.patches(batch)
    assert torch.equal(other, neighbour.flip(0)) and torch.equal(flipped, patches.flip(0))
    batch.epoch = 1
    assert not torch.equal(method.patches(batch)[0], other)


def test_dropping_leaves_one_channel_and_noise_of_a_hundredth():
    case = Case(NAMES["context"], SMALL | {"patch_size": 16}, image_size=64, batch_size=24)
    plain = build(case, args=case.args | {"color": "none"}).double()
    method, batch = build(case).double(), make_batch(case, dtype=torch.float64)
    true, dropped = plain.patches(batch)[1], method.patches(batch)[1]
    kept = (true == dropped).all(4).all(3)
    assert kept.sum(2).eq(1).all() and kept.any(0).all()
    assert (kept[:, 0] != kept[:, 1]).any(), "a channel for each patch"
    scale = true.std((3, 4))[kept].view(24, 2, 1, 1)
    noise = (dropped / scale[..., None])[~kept]
    assert abs(noise.mean()) < 3e-4 and noise.std().item() == pytest.approx(0.01, rel=0.05)
    normal = (noise / noise.std()).flatten()
    assert normal.pow(4).mean().item() == pytest.approx(3.0, rel=0.1)
    assert noise[0].flatten().unique().numel() == 256


def test_projection_takes_out_green_against_magenta():
    plain, batch = double("context", args=SMALL | {"color": "none"})
    method, _ = double("context", args=SMALL | {"color": "project"})
    true, projected = plain.patches(batch)[1], method.patches(batch)[1]
    a = torch.tensor([[-1.0, 2.0, -1.0]]).double()
    matrix = torch.eye(3).double() - a.T @ a / (a @ a.T)
    torch.testing.assert_close(projected, (matrix @ true.flatten(3)).view_as(true))


def test_an_exemplar_is_its_formula():
    method, batch = double("exemplar_shared")

    def formula():
        features = torch.cat([method.model(view) for view in batch.views])
        logits = features @ method.head.weight.T + method.head.bias
        return mean_surprise(logits, [i % 5 for i in batch.index.tolist()] * 2)

    assert_same_step(method, batch, formula)


def test_an_exemplar_has_a_class_of_its_own():
    method, batch = double("exemplar")
    assert method.head.weight.shape == (24, 8)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.zero_()[batch.index[2]] = 1.0
    assert method(batch)["accuracy"].item() == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", ["rotation", "context", "exemplar"])
def test_the_answers_can_be_learnt(name):
    """A few steps on one batch, whatever is drawn for it, raise the accuracy."""
    case = CASES[name]
    torch.manual_seed(0)
    method, batch = build(case, model_args={"width": 32}), make_batch(case)
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    for _ in range(60):
        outputs = method(batch)
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs["accuracy"] > 0.8


def test_views_are_the_papers():
    (view,) = make_views(method_class(NAMES["context"]), 224)
    assert view.ratio == (1.0, 1.0)
    assert build(Case(NAMES["context"], image_size=224)).grid_side == 200


@pytest.mark.parametrize(
    "case, message",
    [
        (Case(NAMES["rotation"], image_size=(16, 24)), "must be square for rotation, got 16 x 24"),
        (Case(NAMES["rotation"], views=[{"number": 2}]), "1 views of a sample for rotation, got 2"),
        (Case(NAMES["context"], SMALL), r"2 \* gap \+ 2 \* jitter <= 16, got 18"),
        (Case(NAMES["context"], {"gap": -1}), "gap must be at least 0, got -1"),
        (Case(NAMES["context"], {"color": "grey"}), "one of drop, project, none, got 'grey'"),
        (Case(NAMES["context"], views=[{"number": 2}]), "1 views of a sample for context"),
        (Case(NAMES["exemplar"], {"num_classes": 0}), "num_classes must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(case, message):
    with pytest.raises(ValueError, match=message):
        build(case)


def test_projection_needs_three_channels():
    method, batch = double("context", args=SMALL | {"color": "project"})
    batch.views = (interpolate(batch.images, 24)[:, :1],)
    with pytest.raises(ValueError, match="project needs 3 channels, got 1"):
        method.patches(batch)
