"""I-JEPA and data2vec: what they predict of hidden patches, alone and in several processes."""

import copy

import pytest
import torch
from torch.nn.functional import layer_norm

from fastssl.nn import sincos_pos_embed_2d
from fastssl.nn.drop_path import DropPath
from tests.methods.checks import (
    TINY_VIT,
    Case,
    TinyEncoder,
    build,
    check_all,
    check_processes,
    make_batch,
)

VIT = {"model": "VisionTransformer", "model_args": TINY_VIT}
PREDICTOR = {"predictor_dim": 8, "predictor_depth": 2, "predictor_heads": 2}
# A grid of 6 x 6 patches, where blocks of I-JEPA's shares have several sizes.
IJEPA = Case("ijepa", PREDICTOR, image_size=24, **VIT)
DATA2VEC = Case("data2vec", {"top_k": 2, "min_block": 3}, **VIT)
CASES = {
    "ijepa": IJEPA,
    "ijepa_l2": Case(
        "ijepa",
        {**PREDICTOR, "loss": "l2", "num_targets": 2, "context_keep": 0.2},
        model="VisionTransformer",
        model_args=TINY_VIT | {"num_register_tokens": 2},
        image_size=(16, 24),
    ),
    "data2vec": DATA2VEC,
    "data2vec_block": Case(
        "data2vec",
        {"top_k": 1, "target": "block", "min_block": 2},
        model="VisionTransformer",
        model_args=TINY_VIT | {"init_values": 0.1, "num_register_tokens": 1},
        image_size=(16, 24),
    ),
}


def started(case, **changes):
    """In float64, with a teacher that differs from the student."""
    method = build(case, **changes).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in method.teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.1 * noise)
    method.before_step({n: s(0, case.num_steps) for n, s in method.schedules.items()})
    return method


def assert_same_step(method, batch, formula):
    """The loss and the gradients of `method(batch)` are those of `formula()`."""
    loss = method(batch)["loss"]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}
    method.zero_grad()
    expected = formula()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad)
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


@pytest.mark.parametrize("name", ["ijepa", "ijepa_l2"])
def test_ijepa_is_its_formula(name):
    case = CASES[name]
    method, batch = started(case), make_batch(case, dtype=torch.float64)
    prefix = method.student.num_prefix_tokens
    ids, targets = method.masks(batch)

    def formula():
        with torch.no_grad():
            true = layer_norm(method.teacher.forward_features(batch.images)[:, prefix:], (16,))
        terms = []
        for b, image in enumerate(batch.images):
            seen = method.student.forward_features(image[None], ids_keep=ids[b : b + 1])
            for block in targets[b]:
                where = (ids[b : b + 1], block[None, None])
                pred = method.predictor(seen[:, prefix:], *where)[0, 0]
                error = (pred - true[b, block]).abs()
                if name == "ijepa":
                    error = torch.where(error < 1, 0.5 * error**2, error - 0.5)
                else:
                    error = error**2
                terms.append(error.mean())
        return torch.stack(terms).mean()

    assert_same_step(method, batch, formula)


def test_ijepa_hides_the_targets_from_the_student():
    """Though every context has the same number of patches, which many would not reach."""
    case = Case(IJEPA.name, PREDICTOR | {"context_keep": 0.34}, image_size=40, **VIT)
    method, batch = started(case), make_batch(case)
    batch.index = torch.arange(300)
    for batch.step in range(4):
        ids, targets = method.masks(batch)
        assert ids.shape == (300, 34)
        for context, hidden in zip(ids.tolist(), targets.flatten(1).tolist(), strict=True):
            assert len(set(context)) == 34 and not set(context) & set(hidden)


def test_ijepa_masks_depend_on_the_sample_not_on_its_batch():
    method, batch = started(IJEPA), make_batch(IJEPA)
    ids, targets = method.masks(batch)
    batch.index = batch.index.flip(0)
    flipped = method.masks(batch)
    assert torch.equal(flipped[0], ids.flip(0)) and torch.equal(flipped[1], targets.flip(0))
    batch.step = 1
    assert not torch.equal(method.masks(batch)[0], flipped[0])


def test_ijepa_predictor_knows_a_target_by_its_position_alone():
    method, batch = started(IJEPA), make_batch(IJEPA, dtype=torch.float64)
    ids, targets = method.masks(batch)
    context = torch.randn(8, 10, 16, dtype=torch.float64)
    pred = method.predictor(context, ids, targets)
    turned = method.predictor(context, ids, targets.flip(2))
    torch.testing.assert_close(turned.flip(2), pred)
    order = torch.randperm(10)
    torch.testing.assert_close(method.predictor(context[:, order], ids[:, order], targets), pred)
    assert (pred[0, 0, 0] - pred[0, 0, 1]).abs().max() > 1e-6


def test_ijepa_predictor_puts_tokens_in_the_targets_places():
    method, batch = started(IJEPA), make_batch(IJEPA, dtype=torch.float64)
    ids, targets = method.masks(batch)
    predictor, context = method.predictor, torch.randn(8, 10, 16, dtype=torch.float64)
    pred = predictor(context, ids, targets)
    places = sincos_pos_embed_2d(8, (6, 6)).double()
    for b in range(0, 8, 3):
        for m in range(4):
            asked = [predictor.mask_token + places[n] for n in targets[b, m]]
            seen = [predictor.embed(x) + places[n] for x, n in zip(context[b], ids[b], strict=True)]
            x = torch.stack(asked + seen)[None]
            for block in predictor.blocks:
                x = block(x)
            expected = predictor.proj(predictor.norm(x[0, : len(asked)]))
            torch.testing.assert_close(pred[b, m], expected)


def test_ijepa_judges_the_teachers_mean_patch():
    method, batch = started(IJEPA), make_batch(IJEPA, dtype=torch.float64)
    assert method.model is method.teacher
    tokens = method.teacher.forward_features(batch.images)
    torch.testing.assert_close(method.features(batch.images), tokens[:, 1:].mean(1))


@pytest.mark.parametrize("name", ["data2vec", "data2vec_block"])
def test_data2vec_is_its_formula(name):
    case = CASES[name]
    method, batch = started(case), make_batch(case, dtype=torch.float64)
    prefix = method.student.num_prefix_tokens
    mask = method.mask(batch)

    def outputs(teacher, images):
        """What the last blocks make of whole images, the blocks written out."""
        x = teacher.patch_embed(images) + teacher.pos_embed[:, 1:]
        first = [teacher.cls_token + teacher.pos_embed[:, :1]]
        if prefix > 1:
            first.append(teacher.register_tokens)
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in first), x], 1)
        found = []
        for block in teacher.blocks:
            x = x + block.ls1(block.attn(block.norm1(x)))
            branch = block.ls2(block.mlp(block.norm2(x)))
            x = x + branch
            found.append(branch if name == "data2vec" else x)
        return found[-method.top_k :]

    def formula():
        with torch.no_grad():
            normed = [
                layer_norm(x[:, prefix:], (16,)) for x in outputs(method.teacher, batch.images)
            ]
            target = sum(normed) / len(normed)
        tokens = method.student.forward_features(batch.images, masks=mask)[:, prefix:]
        error = (method.head(tokens[mask]) - target[mask]).abs()
        return torch.where(error < 2, 0.5 * error**2 / 2, error - 1).mean()

    assert_same_step(method, batch, formula)


def test_data2vec_sees_masked_patches_in_the_targets_only():
    method, batch = started(DATA2VEC), make_batch(DATA2VEC, dtype=torch.float64)
    mask = method.mask(batch)
    assert mask.sum(1).tolist() == [9] * 8  # int(0.6 * 16)
    pixels = mask.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = batch.images.where(~pixels, batch.images + 1)
    seen = [method.student.forward_features(x, masks=mask) for x in (batch.images, other)]
    torch.testing.assert_close(*seen)
    assert (method.targets(batch.images) - method.targets(other)).abs().max() > 1e-3


def test_data2vec_masks_are_keyed():
    method, batch = started(DATA2VEC), make_batch(DATA2VEC)
    mask = method.mask(batch)
    batch.index = batch.index.flip(0)
    assert torch.equal(method.mask(batch), mask.flip(0))
    batch.epoch = 1
    assert not torch.equal(method.mask(batch), mask.flip(0))


def test_data2vec_leaves_no_hooks():
    method, batch = started(DATA2VEC), make_batch(DATA2VEC, dtype=torch.float64)
    first = method.targets(batch.images)
    assert not any(m._forward_hooks for m in method.modules())
    twin = copy.deepcopy(method)
    torch.testing.assert_close(twin.targets(batch.images), first)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ijepa", "data2vec"])
def test_compiles(name):
    case = CASES[name]
    method, batch = build(case), make_batch(case)
    expected = method(batch)["loss"]
    method.compile(backend="aot_eager")
    torch.testing.assert_close(method(batch)["loss"], expected)


@pytest.mark.parametrize("name", ["ijepa", "data2vec"])
def test_the_teacher_follows_without_dropping_paths(name):
    case = CASES[name]
    method = started(case, model_args=case.model_args | {"drop_path_rate": 0.5})
    assert all(m.drop_prob == 0 for m in method.teacher.modules() if isinstance(m, DropPath))
    assert any(m.drop_prob > 0 for m in method.student.modules() if isinstance(m, DropPath))
    method.before_step({"teacher_momentum": 0.75})
    before = method.teacher.cls_token.clone()
    method(make_batch(case, dtype=torch.float64))["loss"].backward()
    method.after_step()
    expected = 0.75 * before + 0.25 * method.student.cls_token
    torch.testing.assert_close(method.teacher.cls_token, expected.detach())


def test_momentum_is_the_papers():
    schedules = {name: build(case).schedules["teacher_momentum"] for name, case in CASES.items()}
    assert [schedules["ijepa"](step, 10) for step in (0, 5, 10)] == pytest.approx([0.996, 0.998, 1])
    assert [schedules["data2vec"](step, 10) for step in (0, 10)] == [0.9998, 0.9998]


@pytest.mark.parametrize(
    "case, args, message",
    [
        (IJEPA, {"loss": "l1"}, "method.args.loss must be one of smooth_l1, l2, got 'l1'"),
        (IJEPA, {"context_keep": 0.01}, "context_keep must be a share .*6 x 6 patches, got 0.01"),
        (IJEPA, {"context_keep": 1.1}, "context_keep must be a share .*6 x 6 patches, got 1.1"),
        (DATA2VEC, {"target": "attn"}, "method.args.target must be one of ffn, block, got 'attn'"),
        (DATA2VEC, {"top_k": 3}, "top_k must be at least 1 and at most 2, got 3"),
        (DATA2VEC, {"mask_ratio": 0.01}, "mask_ratio must hide 1 to 16 of 16 patches, got 0.01"),
        (DATA2VEC, {"beta": 0.0}, "beta must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(case, args, message):
    with pytest.raises(ValueError, match=message):
        build(case, args={**case.args, **args})


def other_encoder(use_mask_token=True):
    return TinyEncoder()


@pytest.mark.parametrize("case", [IJEPA, DATA2VEC])
def test_models_and_views_that_do_not_fit_are_named(case):
    with pytest.raises(ValueError, match="must build a VisionTransformer"):
        build(case, model="tests.methods.test_predictive_methods:other_encoder", model_args={})
    with pytest.raises(ValueError, match="must make 1 views of a sample"):
        build(Case(case.name, case.args, **VIT, views=[{"number": 2}]))


def test_data2vec_needs_a_mask_token():
    with pytest.raises(ValueError, match="use_mask_token must be true"):
        build(DATA2VEC, model_args=TINY_VIT | {"use_mask_token": False})
