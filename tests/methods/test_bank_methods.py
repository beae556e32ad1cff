"""Methods with a memory bank, and CPC: what they compute, alone and in several processes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from fastssl import functional as F
from fastssl.methods.bank_contrast import BankContrast
from fastssl.methods.cpc import MaskedConvBlock, patch_grid
from fastssl.methods.pirl import jigsaw_patches, rotate
from tests.methods.checks import TINY_VIT, Case, build, check_all, check_processes, make_batch

NPID = "npid"
PIRL = "pirl"
CPC = "cpc"
VIT = {"model": "VisionTransformer", "model_args": TINY_VIT}
DROPPING = VIT | {"model_args": {**TINY_VIT, "drop_path_rate": 0.1}}
BATCH_NORM = {"model_args": {"batch_norm": True}, "accumulates": False}
SAMPLED = {"output_dim": 6, "num_negatives": 5}
WHOLE = {"output_dim": 6, "num_negatives": None}
JIGSAW = SAMPLED | {"patch_size": 4}
ROTATION = WHOLE | {"pretext": "rotation", "transformed_weight": 0.3}
GRID = {
    "patch_size": 4,
    "stride": 3,
    "steps": [1, 3],
    "target_dim": 5,
    "hidden_dim": 7,
    "num_layers": 2,
}
CASES = {
    "npid": Case(NPID, SAMPLED),
    "npid_whole": Case(NPID, WHOLE),
    "npid_vit": Case(NPID, SAMPLED, **VIT),
    "npid_batch_norm": Case(NPID, WHOLE, **BATCH_NORM),
    "pirl_jigsaw": Case(PIRL, JIGSAW),
    "pirl_jigsaw_whole": Case(PIRL, WHOLE | {"patch_size": 5}, image_size=(16, 20)),
    "pirl_jigsaw_vit": Case(PIRL, JIGSAW, **VIT),
    "pirl_rotation": Case(PIRL, ROTATION),
    "pirl_rotation_batch_norm": Case(PIRL, ROTATION, **BATCH_NORM),
    "cpc": Case(CPC, GRID, accumulates=False),
    "cpc_batch_norm": Case(CPC, GRID, **BATCH_NORM),
    "cpc_vit": Case(CPC, GRID | {"steps": [2]}, accumulates=False, **VIT),
    "pirl_jigsaw_drop_path": Case(PIRL, JIGSAW, **DROPPING),
    "cpc_drop_path": Case(CPC, GRID | {"steps": [2]}, accumulates=False, **DROPPING),
}


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def assert_same_step(method, loss, expected):
    """The same value and the same gradients."""
    torch.testing.assert_close(loss, expected)
    trained = list(method.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)
    )


def softmax_loss(bank, queries, index, others, temperature=0.07):
    """-log of the softmax over each sample's own row of the bank and those of `others` [B, M]."""
    queries, loss = normalize(queries, dim=1), 0.0
    for query, sample, drawn in zip(queries, index, others, strict=True):
        own = (query @ bank[sample] / temperature).exp()
        rest = (bank[drawn] @ query / temperature).exp().sum()
        loss = loss - (own / (own + rest)).log() / len(queries)
    return loss


def others_of(method, batch, first):
    """What each sample is told from, by its numbers from position `first` on."""
    bank = method.bank
    if bank.num_negatives is None:
        samples = torch.arange(len(bank.bank))
        return torch.stack([samples[samples != sample] for sample in batch.index])
    number = first + 2 * bank.num_negatives
    uniforms = F.keyed_uniform(
        batch.index, number, seed=5, epoch=batch.epoch, stream=F.STREAM_METHOD
    )
    return bank.drawn(batch.index, uniforms[:, first:])


@pytest.mark.parametrize("name", ["npid", "npid_whole"])
def test_npid_is_its_formula(name):
    method, batch = build(CASES[name]).double(), make_batch(CASES[name], 4, torch.float64)
    assert batch.epoch == 1 and batch.index[0] == 8
    embedding = method.head(method.model(batch.images))
    expected = softmax_loss(method.bank.bank, embedding, batch.index, others_of(method, batch, 0))
    assert_same_step(method, method(batch)["loss"], expected)


@pytest.mark.parametrize("name", ["pirl_jigsaw", "pirl_jigsaw_whole", "pirl_rotation"])
def test_pirl_is_its_formula(name):
    """lambda * nce of the second view transformed + (1 - lambda) * nce of the first."""
    method, batch = build(CASES[name]).double(), make_batch(CASES[name], 4, torch.float64)
    others = others_of(method, batch, 27)
    uniforms = F.keyed_uniform(batch.index, 27, seed=5, epoch=1, stream=F.STREAM_METHOD)
    embedding, transformed = method.head(method.model(batch.views[0])), []
    for i, image in enumerate(batch.views[1]):
        if method.pretext == "rotation":
            turned = image.rot90(int(uniforms[i, 0] * 4), (1, 2))
            transformed.append(method.pretext_head(method.model(turned[None])[0]))
            continue
        patches = jigsaw_patches(image[None], uniforms[i : i + 1, :18], method.patch_size)[0]
        order = uniforms[i, 18:].argsort()
        parts = [method.patch_head(method.model(patches[place][None])[0]) for place in order]
        transformed.append(method.pretext_head(torch.cat(parts)))
    bank, weight = method.bank.bank, {"pirl_rotation": 0.3}.get(name, 0.5)
    expected = weight * softmax_loss(bank, torch.stack(transformed), batch.index, others)
    expected = expected + (1 - weight) * softmax_loss(bank, embedding, batch.index, others)
    assert_same_step(method, method(batch)["loss"], expected)


@pytest.mark.parametrize("name", ["npid", "pirl_jigsaw"])
def test_bank_remembers_what_the_image_looked_like(name):
    """Half of what it was and half of the new, of length 1, after the step."""
    method, batch = build(CASES[name]).double(), make_batch(CASES[name], 1, torch.float64)
    before = method.bank.bank.clone()
    method(batch)
    assert torch.equal(method.bank.bank, before)
    new = normalize(method.head(method.model(batch.views[0])), dim=1)
    method.after_step()
    expected = before.clone()
    expected[8:16] = normalize((before[8:16] + new) / 2, dim=1)
    torch.testing.assert_close(method.bank.bank, expected)


def test_negatives_are_other_samples_evenly():
    bank = BankContrast(5, 2, momentum=0.5, temperature=0.1, num_negatives=4000)
    index = torch.tensor([0, 2, 4])
    uniforms = F.keyed_uniform(index, bank.num_uniforms, seed=1)
    drawn = bank.drawn(index, uniforms)
    assert drawn.shape == (3, 4000) and drawn.dtype == torch.int64
    for sample, row in zip(index, drawn, strict=True):
        counts = row.bincount(minlength=5)
        assert counts[sample] == 0
        # Four times the standard deviation of 4000 draws of one in four.
        assert ((counts - 1000).abs() < 110).sum() == 4
    # The ends of what may be drawn.
    ends = torch.tensor([[0.0, 1 - 2.0**-24, 0.0, 1 - 2.0**-24]])
    small = BankContrast(5, 2, momentum=0.5, temperature=0.1, num_negatives=2)
    assert small.drawn(torch.tensor([3]), ends).tolist() == [[4, 2]]


def test_whole_bank_that_is_the_batch():
    case = replace(CASES["npid_whole"], num_samples=8)
    method, batch = build(case).double(), make_batch(case, dtype=torch.float64)
    queries = normalize(method.head(method.model(batch.images)), dim=1)
    scores = queries @ method.bank.bank.T / 0.07
    expected = torch.nn.functional.cross_entropy(scores, batch.index)
    torch.testing.assert_close(method(batch)["loss"], expected)


def test_jigsaw_patches_lie_in_their_cells():
    images = torch.arange(2 * 3 * 15 * 18).reshape(2, 3, 15, 18)
    uniforms = torch.zeros(2, 18)
    uniforms[1] = 1 - 2.0**-24
    uniforms[0, 5], uniforms[0, 9 + 5] = 0.5, 0.9  # down and right in the sixth cell, [5, 12]
    patches = jigsaw_patches(images, uniforms, 3)
    assert patches.shape == (2, 9, 3, 3, 3)
    assert torch.equal(patches[0, 0], images[0, :, 0:3, 0:3])
    assert torch.equal(patches[0, 7], images[0, :, 10:13, 6:9])
    assert torch.equal(patches[0, 5], images[0, :, 6:9, 15:18])
    assert torch.equal(patches[1, 0], images[1, :, 2:5, 3:6])
    assert torch.equal(patches[1, 8], images[1, :, 12:15, 15:18])


def test_rotation_by_quarters():
    images = torch.arange(4 * 3 * 5 * 5).reshape(4, 3, 5, 5)
    turned = rotate(images, torch.tensor([0.0, 0.3, 0.74, 1 - 2.0**-24]))
    assert torch.equal(turned[0], images[0])
    assert torch.equal(turned[1], images[1].transpose(1, 2).flip(1))
    assert torch.equal(turned[2], images[2].flip(1, 2))
    assert torch.equal(turned[3], images[3].transpose(1, 2).flip(2))


def test_cpc_is_its_formula():
    """Per step k, each prediction finds its patch among all that lie k or more rows down."""
    method, batch = build(CASES["cpc"]).double(), make_batch(CASES["cpc"], dtype=torch.float64)
    grid = torch.stack(
        [
            torch.stack(
                [method.model(batch.images[:, :, r : r + 4, s : s + 4]) for s in range(0, 13, 3)], 1
            )
            for r in range(0, 13, 3)
        ],
        1,
    )  # [8, 5, 5, D]
    context = method.context(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    targets, expected = method.target(grid), 0.0
    for k, predictor in zip((1, 3), method.predictors, strict=True):
        candidates = targets[:, k:].reshape(-1, 5)
        number = 8 * (5 - k) * 5
        assert len(candidates) == number
        for b in range(8):
            for r in range(5 - k):
                for s in range(5):
                    predicted = predictor(context[b, r, s])
                    scores = 0.1 * (candidates @ predicted)
                    own = 0.1 * (targets[b, r + k, s] @ predicted)
                    expected = expected + (scores.logsumexp(0) - own) / number
    assert_same_step(method, method(batch)["loss"], expected)


def test_cpc_context_sees_no_row_below():
    """Row r depends on rows up to r only, and on r itself."""
    torch.manual_seed(0)
    context = torch.nn.Sequential(*(MaskedConvBlock(3, 4) for _ in range(3)))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    for row in range(5):
        (gradient,) = torch.autograd.grad(context(x)[:, :, row].sum(), x)
        reached = gradient.abs().sum(dim=(0, 1, 3)) > 0
        assert reached.tolist() == [max(0, row - 3) <= r <= row for r in range(5)]


def test_patch_grid_overlaps():
    images = torch.arange(2 * 3 * 11 * 9).reshape(2, 3, 11, 9)
    patches = patch_grid(images, 4, 2)
    assert patches.shape == (2, 4, 3, 3, 4, 4)
    for r in range(4):
        for s in range(3):
            expected = images[:, :, 2 * r : 2 * r + 4, 2 * s : 2 * s + 4]
            assert torch.equal(patches[:, r, s], expected)


WRONG = {
    "npid_views": (NPID, SAMPLED, {"views": [{"number": 2}]}, "must make 1 views .* got 2"),
    "npid_one_sample": (NPID, SAMPLED, {"num_samples": 1}, "num_samples must be at least 2, got 1"),
    "npid_none": (NPID, {"num_negatives": 0}, {}, "num_negatives must be at least 1, got 0"),
    "npid_temperature": (NPID, {"temperature": 0.0}, {}, "temperature must be positive, got 0"),
    "pirl_views": (PIRL, JIGSAW, {"views": [{}]}, "must make 2 views .* got 1"),
    "pirl_pretext": (PIRL, {"pretext": "colour"}, {}, "one of jigsaw, rotation, got 'colour'"),
    "pirl_patch": (PIRL, {"patch_size": 6}, {}, "at most a third of the views, .* got 6"),
    "pirl_square": (PIRL, ROTATION, {"image_size": (16, 20)}, "must be square .* got .16, 20."),
    "pirl_weight": (PIRL, JIGSAW | {"transformed_weight": 2}, {}, "must be in .0, 1., got 2"),
    "cpc_views": (CPC, GRID, {"views": [{"number": 2}]}, "must make 1 views .* got 2"),
    "cpc_step": (CPC, GRID | {"steps": [5]}, {}, "number of rows of patches, which is 5 .* got .5"),
    "cpc_no_step": (CPC, GRID | {"steps": []}, {}, "at least one step, got none"),
    "cpc_small": (CPC, {}, {}, "number of rows of patches, which is 0"),
    "cpc_scale": (CPC, GRID | {"scale": -1.0}, {}, "scale must be positive, got -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name):
    method, args, options, message = WRONG[name]
    options = {"batch_size": 1, "num_samples": 24} | options
    with pytest.raises(ValueError, match=message):
        build(Case(method, args, **options))
