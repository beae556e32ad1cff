"""Hiera against transformers' HieraModel, and by itself."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from fastssl import models
from fastssl.models import Hiera
from fastssl.models.transformers_keys import official
from tests.models.vit_keys import assert_relative, randomise

TOLERANCE = 1e-4  # relative, fp32
STAGES = (1, 2, 2, 1)
SMALL = {"input_size": (64, 64), "embed_dim": 8, "stages": STAGES, "num_classes": 0}
CLIP = {
    "input_size": (4, 64, 64),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
}


def small(**kwargs) -> Hiera:
    model = Hiera(**SMALL | kwargs)
    randomise(model)
    return model


def config(size: tuple[int, int], **kwargs) -> transformers.HieraConfig:
    return transformers.HieraConfig(
        image_size=list(size), embed_dim=8, depths=list(STAGES), num_heads=[1, 2, 4, 8], **kwargs
    )


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_parity_with_transformers(size):
    theirs = transformers.HieraModel(config(size))
    randomise(theirs)
    ours = small(input_size=size)
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    expected = theirs(images, output_hidden_states=True)
    out, intermediates = ours(images, return_intermediates=True)
    assert_relative(out, expected.pooler_output, TOLERANCE)
    assert_relative(ours.features(images), expected.pooler_output, TOLERANCE)
    # Theirs lists the embedding before the stages.
    for actual, stage in zip(intermediates, expected.reshaped_hidden_states[1:], strict=True):
        assert_relative(actual, stage, TOLERANCE)

    weights = [torch.randn_like(x) for x in (out, *intermediates)]
    for tensors in (
        (out, *intermediates),
        (expected.pooler_output, *expected.reshaped_hidden_states[1:]),
    ):
        sum((w * x).sum() for w, x in zip(weights, tensors, strict=True)).backward()
    grads = official({n: p.grad for n, p in theirs.named_parameters()})
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_relative(parameter.grad, grads[name], TOLERANCE, name)


@pytest.mark.parametrize("size", [(96, 64), (128, 128)])
def test_another_size_than_built_for_resamples_as_transformers_does(size):
    theirs, ours = transformers.HieraModel(config((64, 64))), small()
    randomise(theirs)
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    expected = theirs(images, interpolate_pos_encoding=True).pooler_output
    assert_relative(ours.features(images), expected, TOLERANCE)


def test_head_gives_logits_in_training_and_probabilities_in_evaluation():
    theirs = transformers.HieraForImageClassification(config((64, 64), num_labels=5)).eval()
    randomise(theirs)
    ours = small(num_classes=5)
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    logits = theirs(images).logits
    assert_relative(ours.train()(images), logits, TOLERANCE)
    assert_relative(ours.eval()(images), logits.softmax(-1), TOLERANCE)


@pytest.mark.parametrize("kwargs", [{}, {"q_pool": 2}, CLIP, CLIP | {"sep_pos_embed": True}])
def test_keeping_all_units_equals_no_mask(kwargs):
    model = small(**kwargs)
    x = torch.randn(2, 3, *model_size(kwargs))
    num_units = 8 if kwargs.get("mask_unit_size") else 4
    _, expected = model(x, return_intermediates=True)
    tokens, actual = model(x, torch.ones(2, num_units).bool(), return_intermediates=True)
    assert_relative(model.norm(tokens.mean(1)), model.features(x), TOLERANCE)
    for units, full in zip(actual, expected, strict=True):
        assert_relative(units, split(full, units.shape[2:-1]), TOLERANCE)


@pytest.mark.parametrize("kwargs", [{}, CLIP])
def test_masked_units_are_those_of_the_whole_where_nothing_mixes_them(kwargs):
    """Attention within units, and black neighbours: a unit comes out as without a mask."""
    model = small(mask_unit_attn=(True,) * 4, **kwargs)
    keep = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    keep = keep.repeat(1, 2) if kwargs else keep
    pixels = keep.float().view(2, 1, *([2] * (3 if kwargs else 2)))
    x = torch.randn(2, 3, *model_size(kwargs))
    x = x * F.interpolate(pixels, size=x.shape[2:])
    _, expected = model(x, return_intermediates=True)
    tokens, actual = model(x, keep, return_intermediates=True)
    for units, full in zip(actual, expected, strict=True):
        whole = split(full, units.shape[2:-1])
        for i in range(2):
            assert_relative(units[i], whole[i, keep[i]], TOLERANCE)
    assert torch.equal(tokens, actual[-1].flatten(1, -2))  # one token a unit, in row-major order


def model_size(kwargs: dict) -> tuple[int, ...]:
    return kwargs.get("input_size", SMALL["input_size"])


def split(x: torch.Tensor, unit: tuple[int, ...]) -> torch.Tensor:
    """[B, *grid, C] -> [B, U, *unit, C], units in row-major order."""
    for dim, n in reversed(list(enumerate(unit, start=1))):
        x = x.unflatten(dim, (-1, n))
    outer, inner = range(1, 2 * len(unit), 2), range(2, 2 * len(unit) + 1, 2)
    return x.permute(0, *outer, *inner, x.dim() - 1).flatten(1, len(unit))


def test_mask_is_one_where_kept_and_removed_pixels_are_not_seen():
    model, images = small(), torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[True, False, False, False]])
    expected = model(images, mask)
    other = images.clone()
    other[:, :, 32:] = float("nan")
    other[:, :, :, 32:] = float("inf")
    assert torch.equal(model(other, mask), expected)
    assert not torch.equal(model(images + 1, mask), expected)


def test_separate_position_embeddings_of_space_and_time_are_added():
    apart, joint = small(**CLIP, sep_pos_embed=True), small(**CLIP)
    state = apart.state_dict()
    space, time = state.pop("pos_embed_spatial"), state.pop("pos_embed_temporal")
    assert space.shape == (1, 256, 8) and time.shape == (1, 2, 8)
    state["pos_embed"] = torch.cat([space + time[:, i : i + 1] for i in range(2)], dim=1)
    joint.load_state_dict(state)
    clips = torch.randn(2, 3, 4, 64, 64)
    assert_relative(apart.features(clips), joint.features(clips), TOLERANCE)
    longer = torch.randn(2, 3, 6, 96, 64)
    # Two embeddings are resampled each by itself, and the sum of two as the sum of theirs.
    assert_relative(apart.features(longer), joint.features(longer), TOLERANCE)


# Parameters of the released models, counted with the official code.
@pytest.mark.parametrize(
    "image, clip, count, clip_count",
    [
        ("tiny", None, 27_910_216, None),
        ("small", None, 35_008_072, None),
        ("base", "base", 51_524_968, 51_092_560),
        ("base_plus", "base_plus", 69_896_616, 69_392_240),
        ("large", "large", 213_739_912, 213_091_600),
        ("huge", "huge", 672_779_752, 671_627_664),
    ],
)
def test_factories_are_the_released_configurations(image, clip, count, clip_count):
    names = [f"hiera_{image}_224"] + [f"hiera_{clip}_16x224"] * bool(clip)
    for name, expected in zip(names, (count, clip_count), strict=False):
        with torch.device("meta"):
            model = getattr(models, name)()
        assert sum(p.numel() for p in model.parameters()) == expected
        assert model.norm.eps == 1e-6
        assert model.num_features == 8 * model.embed_dim


def test_short_names_and_overrides():
    for short, size in zip("TSBLH", ("tiny", "small", "base", "large", "huge"), strict=True):
        assert getattr(models, f"Hiera{short}") is getattr(models, f"hiera_{size}_224")
    assert models.HieraBPlus is models.hiera_base_plus_224
    with torch.device("meta"):
        model = models.HieraT(input_size=(64, 96), stages=(1, 2, 1, 1), drop_path_rate=0.4)
    assert model.tokens_spatial_shape == (16, 24) and len(model.blocks) == 5
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_random_initialisation_is_the_official_one():
    model = Hiera(input_size=(64, 64), embed_dim=48, stages=(1, 1, 1, 1), num_classes=50)
    for name in ("patch_embed.proj", "blocks.1.attn.qkv", "blocks.3.mlp.fc1", "blocks.2.proj"):
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    biases = [model.blocks[0].attn.proj.bias, model.norm.bias, model.blocks[2].proj.bias]
    assert all((bias == 0.02).all() for bias in biases)
    assert model.head.projection.weight.std().item() == pytest.approx(2e-5, rel=0.03)
    assert torch.allclose(model.head.projection.bias, torch.tensor(2e-5))


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = small(num_classes=3)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{}, CLIP | {"sep_pos_embed": True}])
def test_compiles_into_one_graph(kwargs):
    model = small(**kwargs)
    x = torch.randn(2, 3, *model_size(kwargs))
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_bf16_autocast_is_close_to_float32():
    model, images = small(), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    expected = model(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model(images, mask)
    assert_relative(tokens.float(), expected, 0.03)


def test_refuses_inputs_that_do_not_fit():
    model, clips = small(), small(**CLIP)
    with pytest.raises(ValueError, match=r"divisible by 32 x 32 \(mask unit .*, got 64 x 80"):
        model(torch.randn(1, 3, 64, 80))
    with pytest.raises(ValueError, match=r"divisible by 2 x 32 x 32 .*, got 3 x 64 x 64"):
        clips(torch.randn(1, 3, 3, 64, 64))
    with pytest.raises(ValueError, match=r"have dimensions \[B, C, T, H, W\], got 4"):
        clips(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got \[1, 4, 64, 64\]"):
        model(torch.randn(1, 4, 64, 64))


def test_refuses_masks_that_do_not_fit():
    model, images = small(), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    with pytest.raises(TypeError, match=r"mask must be bool .*, got torch.float32"):
        model(images, mask.float())
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 4\], got \[2, 3\]"):
        model(images, mask[:, :3])
    mask[0, 1] = True
    with pytest.raises(ValueError, match=r"same number of units in every row.*; got 2 to 3"):
        model(images, mask)
    with pytest.raises(ValueError, match="at least 1; got 0 to 0"):
        model(images, torch.zeros_like(mask))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"input_size": (60, 64)}, "divisible by 32 x 32 .*, got 60 x 64"),
        ({"input_size": (64,)}, r"input_size must be \(H, W\) or \(T, H, W\), got \(64,\)"),
        ({"input_size": (4, 64, 64)}, r"q_stride must have 3 entries .*, got \(2, 2\)"),
        ({"q_pool": 4}, r"q_pool must be in \[0, 4\), got 4"),
        ({"mask_unit_size": (4, 4)}, r"mask_unit_size must be divisible by .*, got \(4, 4\)"),
        ({"mask_unit_attn": (True, False)}, "mask_unit_attn must have 4 entries"),
        ({"patch_padding": (1, 3)}, "2 . patch_padding < patch_kernel must hold"),
        ({"sep_pos_embed": True}, r"sep_pos_embed needs input_size \(T, H, W\)"),
        ({"embed_dim": 9, "num_heads": 2}, "divisible by heads=2, got 9"),
    ],
)
def test_refuses_sizes_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Hiera(**SMALL | kwargs)


@pytest.mark.parametrize("name", ["input_size", "stages", "mask_unit_size", "q_stride"])
def test_refuses_numbers_for_tuples(name):
    with pytest.raises(TypeError, match=f"{name} must be a tuple, got 64"):
        Hiera(**SMALL | {name: 64})
