"""MaskedAutoencoderHiera against transformers' HieraForPreTraining, and by itself.

`num_query_pool` of transformers' configuration is the official `q_pool`. Its default is 3, that of
classification; the released masked autoencoders pool twice (num_query_pool=2), which leaves 2 x 2
tokens of a mask unit of 8 x 8, each predicting 16 x 16 pixels. The width grows after every stage
all the same, and stage 3, not pooled behind, is the one that the decoder does not see.
"""

import itertools
import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from fastssl import models
from fastssl.models import MaskedAutoencoderHiera
from fastssl.models.mae_hiera import FusionHead
from fastssl.models.transformers_keys import official
from fastssl.nn.mask_units import UnitLayout
from tests.models.test_hiera import CLIP
from tests.models.vit_keys import assert_relative, randomise

TOLERANCE = 1e-4  # relative, fp32
STAGES = (1, 2, 2, 1)
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
SMALL = {"input_size": (64, 64), "embed_dim": 8, "stages": STAGES, "q_pool": 2} | DECODER


def small(**kwargs) -> MaskedAutoencoderHiera:
    model = MaskedAutoencoderHiera(**SMALL | kwargs)
    randomise(model)
    return model


def reference(size: tuple[int, int], q_pool: int = 2, norm_pix_loss: bool = True):
    config = transformers.HieraConfig(
        image_size=list(size),
        embed_dim=8,
        depths=list(STAGES),
        num_heads=[1, 2, 4, 8],
        num_query_pool=q_pool,
        decoder_hidden_size=16,
        decoder_depth=2,
        decoder_num_heads=2,
        normalize_pixel_loss=norm_pix_loss,
    )
    model = transformers.HieraForPreTraining(config)
    randomise(model)
    return model


@pytest.mark.parametrize(
    "size, q_pool, norm_pix_loss",
    [((96, 96), 2, True), ((64, 128), 2, True), ((64, 128), 2, False), ((96, 96), 3, True)],
)
def test_parity_with_transformers(size, q_pool, norm_pix_loss):
    theirs = reference(size, q_pool, norm_pix_loss)
    ours = small(input_size=size, q_pool=q_pool, norm_pix_loss=norm_pix_loss)
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(3, 3, *size)
    noise = torch.rand(3, size[0] * size[1] // 1024)
    expected = theirs(images, noise=noise)
    loss, preds, labels, mask = ours(images, noise=noise)
    pred, visible = ours.predict(images, noise=noise)
    assert labels is None
    assert torch.equal(visible, expected.bool_masked_pos)
    assert_relative(pred, expected.logits, TOLERANCE)
    assert_relative(preds, expected.logits[~visible], TOLERANCE)
    assert_relative(loss, expected.loss, TOLERANCE)
    # theirs is at the resolution of the prediction; every token of a unit shares its fate.
    side = 8 // 2**q_pool
    grid = visible.unflatten(1, (size[0] // 32 * side, size[1] // 32 * side))
    assert torch.equal(mask, grid[:, ::side, ::side].flatten(1))

    loss.backward()
    expected.loss.backward()
    grads = official({n: p.grad for n, p in theirs.named_parameters()})
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert_relative(parameter.grad, grads[name], TOLERANCE, name)


@pytest.mark.parametrize(
    "shape, stride", [((8, 8), (2, 2)), ((4, 8), (1, 2)), ((1, 8, 8), (1, 2, 2))]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_fusion_head_is_a_convolution_of_each_unit(shape, stride, dtype):
    torch.manual_seed(0)
    layout = UnitLayout(shape, stride, 2)
    head = FusionHead(6, 10, layout)
    B, K = 2, 3
    units = torch.randn(B * K, *shape, 6)
    x = layout.unroll(units).unflatten(0, (B, K)).flatten(1, 2).requires_grad_()
    convolution = torch.conv2d if len(shape) == 2 else torch.conv3d
    kernel = head.weight.shape[2:]
    wanted = convolution(units.movedim(-1, 1), head.weight, head.bias, stride=kernel).movedim(1, -1)
    # What remains of a unit is read in the order of its layout.
    rest = UnitLayout(layout.final_shape, stride, 0)
    wanted = rest.unroll(wanted).unflatten(0, (B, K)).flatten(1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        actual = head(x)
    assert actual.dtype == (dtype or torch.float32) and actual.is_contiguous()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype else {}
    torch.testing.assert_close(actual.float(), wanted, **tolerance)
    actual.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().min() > 0


def test_features_are_of_the_whole_image():
    theirs, ours = reference((64, 64)), small()
    ours.load_state_dict(official(theirs.state_dict()))
    theirs.hiera.embeddings.patch_embeddings.mask_ratio = 0.0
    images = torch.randn(2, 3, 64, 64)
    stages = theirs.hiera(images, output_hidden_states=True).reshaped_hidden_states
    fused = theirs.multiscale_fusion((stages[1], stages[2], stages[4]))
    expected = theirs.encoder_norm(fused).flatten(1, -2).mean(1)
    assert_relative(ours.features(images), expected, TOLERANCE)


@pytest.mark.parametrize("kwargs", [{}, {"norm_pix_loss": False}, CLIP])
def test_mask_is_one_where_kept_and_the_rest_is_predicted(kwargs):
    model = small(**kwargs)
    x = torch.randn(2, 3, *(SMALL | kwargs)["input_size"])
    num_units = 8 if kwargs == CLIP else 4
    noise = torch.rand(2, num_units)
    loss, preds, labels, mask = model(x, 0.5, noise=noise, return_labels=True)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [num_units // 2] * 2
    for values, kept in zip(noise, mask, strict=True):
        assert values[kept].max() < values[~kept].min()
    again = model(x, mask=mask, return_labels=True)
    torch.testing.assert_close(again, (loss, preds, labels, mask))
    pred, visible = model.predict(x, 0.5, noise=noise)
    torch.testing.assert_close(preds, pred[~visible])
    target = model.patchify(x)[~visible]
    if model.norm_pix_loss:
        std, mean = torch.std_mean(target, dim=1, keepdim=True)
        target = (target - mean) / (std**2 + 1e-6) ** 0.5
    torch.testing.assert_close(labels, target)
    torch.testing.assert_close(loss, (preds - labels).square().mean())


def test_the_last_block_goes_on_with_the_removed_tokens():
    model, rows = small(), []
    for module in (model.decoder_blocks[-1].attn.proj, model.decoder_blocks[-1].mlp):
        module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model.decoder_pred.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model(torch.randn(2, 3, *SMALL["input_size"]), 0.75)
    num_tokens = math.prod(model.tokens_spatial_shape_final)
    assert rows == [num_tokens * 3 // 4] * 3


def test_removed_pixels_change_the_loss_only():
    model, images = small(), torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[True, False, False, True]])
    loss, preds, _, _ = model(images, mask=mask)
    other = images.clone()
    other[:, :, :32, 32:] = torch.randn(32, 32)
    other_loss, other_preds, _, _ = model(other, mask=mask)
    assert torch.equal(preds, other_preds) and loss != other_loss
    assert not torch.equal(preds, model(images + 1, mask=mask)[1])


def test_noise_is_drawn_from_torchs_generator():
    model, images = small(input_size=(128, 128)), torch.randn(2, 3, 128, 128)
    torch.manual_seed(1)
    first = model(images)[3]
    second = model(images)[3]
    torch.manual_seed(1)
    assert torch.equal(first, model(images)[3])
    assert first.sum(1).tolist() == [6, 6]  # int(16 * 0.4)
    assert not torch.equal(first, second)


def test_patchify_lists_channels_first_for_images_and_last_for_clips():
    image, clip = torch.randn(2, 3, 64, 96), torch.randn(2, 3, 4, 64, 96)
    model = small(input_size=(64, 96))
    patches = model.patchify(image)
    assert torch.equal(patches[1, 8], image[1, :, 16:32, 32:48].flatten())  # row 1, column 2
    assert torch.equal(model.unpatchify(patches, (64, 96)), image)
    model = small(**CLIP)
    patches = model.patchify(clip)  # second token in time, row 1, column 2
    expected = clip[1, :, 2, 16:32, 32:48].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, 24 + 8], expected)
    assert torch.equal(model.unpatchify(patches, (4, 64, 96)), clip[:, :, ::2])


def slow_attention(attn, x: list[torch.Tensor], pooled: bool) -> list[torch.Tensor]:
    """Attention among all tokens of the grids [1, h, w, C] in `x`, queries pooled 2 x 2."""
    qkv = [attn.qkv(grid) for grid in x]
    q, k, v = zip(*(grid.chunk(3, dim=-1) for grid in qkv), strict=True)
    q = [max_pool(grid) for grid in q] if pooled else q
    k, v = (torch.cat([grid.flatten(0, 2) for grid in grids]) for grids in (k, v))
    heads = [tensor.chunk(attn.heads, dim=-1) for tensor in (k, v)]
    out = []
    for grid in q:
        parts = []
        for q_head, k_head, v_head in zip(grid.chunk(attn.heads, dim=-1), *heads, strict=True):
            scores = q_head @ k_head.T / k_head.shape[1] ** 0.5
            parts.append(scores.softmax(-1) @ v_head)
        out.append(attn.proj(torch.cat(parts, -1)))
    return out


def max_pool(grid: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(grid.movedim(-1, 1), 2).movedim(1, -1)


def slow_block(block, x: list[torch.Tensor], pooled: bool, within: bool) -> list[torch.Tensor]:
    """A Hiera block on the token grids of the kept units."""
    normed = [block.norm1(grid) for grid in x]
    if block.proj is not None:
        x = [block.proj(grid) for grid in normed]
        x = [max_pool(grid) for grid in x] if pooled else x
    if within:
        attended = [slow_attention(block.attn, [grid], pooled)[0] for grid in normed]
    else:
        attended = slow_attention(block.attn, normed, pooled)
    x = [a + b for a, b in zip(x, attended, strict=True)]
    return [grid + block.mlp(block.norm2(grid)) for grid in x]


def slow_clip_loss(model: MaskedAutoencoderHiera, clip: torch.Tensor, kept: list[int]):
    """Loss and predictions of one clip [3, 4, 64, 64] on token grids, unit by unit.

    Units of 1 x 8 x 8 tokens of 2 x 4 x 4 pixels: 2 x 2 x 2 of them. Stages 2 and 3 pool.
    """
    corners = list(itertools.product((0, 1), repeat=3))
    pixels = torch.zeros(4, 64, 64)
    for t, h, w in (corners[i] for i in kept):
        pixels[2 * t : 2 * t + 2, 32 * h : 32 * h + 32, 32 * w : 32 * w + 32] = 1
    conv = model.patch_embed.proj
    tokens = F.conv3d(clip * pixels, conv.weight, conv.bias, (2, 4, 4), (1, 3, 3)).movedim(0, -1)
    space = model.pos_embed_spatial.view(1, 16, 16, -1)
    tokens = tokens + space + model.pos_embed_temporal.view(2, 1, 1, -1)
    x = [
        tokens[t : t + 1, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
        for t, h, w in (corners[i] for i in kept)
    ]
    outputs, first, stage = [], 0, 0
    for i, block in enumerate(model.blocks):
        if i - first == STAGES[stage]:
            outputs.append(x)
            first, stage = i, stage + 1
        begins = i == first and stage > 0
        within = (stage - 1 if begins else stage) < 2
        x = slow_block(block, x, pooled=begins and stage <= 2, within=within)
    canvas = model.mask_token.expand(2, 4, 4, -1).clone()
    for place, i in enumerate(kept):
        fused = x[place]
        for head, stride, output in zip(
            model.multi_scale_fusion_heads, (4, 2), outputs, strict=False
        ):
            image = output[place].permute(3, 0, 1, 2)
            fused = fused + F.conv3d(image, head.weight, head.bias, (1, stride, stride)).movedim(
                0, -1
            )
        t, h, w = corners[i]
        latent = model.decoder_embed(model.encoder_norm(fused))
        canvas[t : t + 1, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = latent
    x = [canvas + model.decoder_pos_embed.view(2, 4, 4, -1)]
    for block in model.decoder_blocks:
        x = slow_block(block, x, pooled=False, within=False)
    pred = model.decoder_pred(model.decoder_norm(x[0]))
    errors, preds = [], []
    for t, row, column in itertools.product(range(2), range(4), range(4)):
        if corners.index((t, row // 2, column // 2)) in kept:
            continue
        frame = clip[:, 2 * t, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        target = frame.permute(1, 2, 0).flatten()
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        preds.append(pred[t, row, column])
        errors.append((preds[-1] - target).square().mean())
    return torch.stack(errors).mean(), torch.stack(preds)


def test_clips_equal_a_slow_formula():
    model = small(**CLIP, sep_pos_embed=True)
    clips, mask = torch.randn(2, 3, 4, 64, 64), torch.zeros(2, 8).bool()
    kept = [[0, 3, 6], [1, 4, 5]]
    mask.scatter_(1, torch.tensor(kept), True)
    slow = [slow_clip_loss(model, clip, units) for clip, units in zip(clips, kept, strict=True)]
    expected = torch.stack([loss for loss, _ in slow]).mean()
    loss, preds, _, _ = model(clips, mask=mask)
    assert_relative(loss, expected, TOLERANCE)
    assert_relative(preds, torch.cat([p for _, p in slow]), TOLERANCE)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for name, actual, grad in zip(names, *grads, strict=True):
        assert_relative(actual, grad, TOLERANCE, name)


def test_another_size_than_built_for_equals_a_model_of_that_size():
    ours, other = small(), small(input_size=(96, 64))
    state = ours.state_dict()
    for name, side, size in (("pos_embed", 16, (24, 16)), ("decoder_pos_embed", 4, (6, 4))):
        grid = state[name].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=size, mode="bicubic")
        state[name] = grid.permute(0, 2, 3, 1).flatten(1, 2)
    other.load_state_dict(state)
    images, noise = torch.randn(2, 3, 96, 64), torch.rand(2, 6)
    torch.testing.assert_close(ours(images, noise=noise)[:2], other(images, noise=noise)[:2])


# Parameters of the released models, counted with the official code.
@pytest.mark.parametrize(
    "size, count, clip_count",
    [
        ("tiny", 55_020_896, None),
        ("small", 62_118_752, None),
        ("base", 78_635_648, 79_367_104),
        ("base_plus", 97_584_064, 98_320_352),
        ("large", 242_875_808, 243_621_760),
        ("huge", 710_081_792, 710_861_568),
    ],
)
def test_factories_are_the_released_configurations(size, count, clip_count):
    names = [f"mae_hiera_{size}_224"] + [f"mae_hiera_{size}_16x224"] * (clip_count is not None)
    for name, expected in zip(names, (count, clip_count), strict=False):
        with torch.device("meta"):
            model = getattr(models, name)()
        assert sum(p.numel() for p in model.parameters()) == expected
        assert model.q_pool == 2 and model.norm_pix_loss
        assert model.decoder_pred.out_features == 768
        assert model.encoder_norm.eps == model.decoder_norm.eps == 1e-6


def test_random_initialisation_is_the_official_one():
    model = MaskedAutoencoderHiera(**SMALL | {"embed_dim": 48, "decoder_embed_dim": 64})
    fans = {
        "patch_embed.proj": (147, 48),
        "blocks.1.attn.qkv": (48, 288),
        "decoder_embed": (384, 64),
        "decoder_blocks.0.mlp.fc1": (64, 256),
    }
    for name, (fan_in, fan_out) in fans.items():
        weight, bound = model.get_submodule(name).weight, (6 / (fan_in + fan_out)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not model.blocks[0].attn.proj.bias.any() and not model.encoder_norm.bias.any()
    for parameter in (model.pos_embed, model.decoder_pos_embed):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    # The fusion heads keep what a convolution of torch starts with.
    weight = model.multi_scale_fusion_heads[0].weight
    torch.manual_seed(0)
    conv = nn.Conv2d(48, 384, 4)
    assert weight.abs().max().item() == pytest.approx(conv.weight.abs().max().item(), rel=0.01)
    assert weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.03)


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = small(**CLIP, sep_pos_embed=True)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{"input_size": (64, 96)}, CLIP | {"sep_pos_embed": True}])
def test_compiles_into_one_graph(kwargs):
    model = small(**kwargs)
    x = torch.randn(2, 3, *kwargs["input_size"])
    noise = torch.rand(2, 8 if kwargs["input_size"] == CLIP["input_size"] else 6)
    expected = model(x, noise=noise, return_labels=True)
    expected[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    actual = compiled(x, noise=noise, return_labels=True)
    actual[0].backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, grads)


def test_bf16_autocast_keeps_the_loss_in_float32():
    model, images, noise = small(), torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    expected, _, _, _ = model(images, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, preds, _, _ = model(images, noise=noise)
    assert loss.dtype == torch.float32 and preds.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_refuses_bad_arguments():
    model, images = small(), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    with pytest.raises(ValueError, match="decoder_depth must be at least 1, got 0"):
        small(decoder_depth=0)
    with pytest.raises(ValueError, match=r"divisible by 32 x 32 .*, got 64 x 80"):
        model(torch.randn(1, 3, 64, 80))
    for mask_ratio in (0.0, 0.8, 1.0, -0.5):
        message = f"mask_ratio={mask_ratio} must keep 1 to 3 of 4 units, it keeps"
        with pytest.raises(ValueError, match=message):
            model(images, mask_ratio=mask_ratio)
    with pytest.raises(ValueError, match="mask must keep 1 to 3 of 4 units, it keeps 4"):
        model(images, mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match="mask and noise cannot be given together"):
        model(images, mask=mask, noise=torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"noise must have shape \[2, 4\], got \[2, 5\]"):
        model(images, noise=torch.rand(2, 5))
    mask[0, 1] = True
    with pytest.raises(ValueError, match=r"same number of units in every row.*; got 2 to 3"):
        model(images, mask=mask)
