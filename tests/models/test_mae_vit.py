"""MaskedAutoencoderViT against transformers' ViTMAEForPreTraining, and by itself."""

import pytest
import torch
import transformers
from torch import nn

from fastssl.models import (
    MaskedAutoencoderViT,
    mae_vit_base_patch16,
    mae_vit_base_patch16_dec512d8b,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
)
from fastssl.models.transformers_keys import official
from tests.models.vit_keys import assert_relative, randomise

TOLERANCE = 1e-4  # relative, fp32
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def small(img_size=32, **kwargs) -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(**SMALL | {"img_size": img_size} | kwargs)


def reference(img_size: int, norm_pix_loss: bool = False) -> transformers.ViTMAEForPreTraining:
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=img_size,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-5,
        norm_pix_loss=norm_pix_loss,
    )
    model = transformers.ViTMAEForPreTraining(config)
    randomise(model)
    return model


def assert_parity(ours: MaskedAutoencoderViT, theirs, images: torch.Tensor, **kwargs) -> None:
    """Same outputs, loss and gradient of every parameter for the same noise."""
    noise = torch.rand(len(images), ours.pos_embed.shape[1] - 1)
    expected = theirs(images, noise=noise, **kwargs)
    loss, pred, mask = ours(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    assert_relative(pred, expected.logits, TOLERANCE)
    assert_relative(loss, expected.loss, TOLERANCE)

    loss.backward()
    expected.loss.backward()
    theirs_grads = official({n: p.grad for n, p in theirs.named_parameters() if p.requires_grad})
    ours_grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert ours_grads.keys() == theirs_grads.keys()
    for name, grad in ours_grads.items():
        assert_relative(grad, theirs_grads[name], TOLERANCE, name)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("img_size", [32, 56])
def test_parity_with_transformers(img_size, norm_pix_loss):
    theirs = reference(img_size, norm_pix_loss)
    ours = small(img_size, norm_pix_loss=norm_pix_loss)
    ours.load_state_dict(official(theirs.state_dict()))
    assert_parity(ours, theirs, torch.randn(3, 3, img_size, img_size))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_parity_on_an_oblong(norm_pix_loss):
    theirs = reference(32, norm_pix_loss)
    ours = small((16, 64), norm_pix_loss=norm_pix_loss)
    state = official(theirs.state_dict())
    # transformers resamples the encoder's positions to 2 x 8 and leaves the decoder's 16 alone.
    tokens = torch.empty(1, 17, 24)
    state["pos_embed"] = theirs.vit.embeddings.interpolate_pos_encoding(tokens, 16, 64)
    ours.load_state_dict(state)
    assert_parity(ours, theirs, torch.randn(3, 3, 16, 64), interpolate_pos_encoding=True)


def test_another_size_than_built_for_resamples_the_encoder_as_transformers_does():
    theirs, ours = reference(32), small(32)
    ours.load_state_dict(official(theirs.state_dict()))
    images, noise = torch.randn(2, 3, 40, 56), torch.rand(2, 35)
    expected = theirs.vit(images, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    latent, _, _ = ours.forward_encoder(images, 0.75, noise)
    assert_relative(latent, expected, TOLERANCE)


def test_another_size_than_built_for_equals_a_model_of_that_size():
    ours, other = small(32), small((16, 48))
    randomise(ours)
    state = ours.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        grid = state[name][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=(2, 6), mode="bicubic").permute(0, 2, 3, 1)
        state[name] = torch.cat([state[name][:, :1], grid.flatten(1, 2)], dim=1)
    other.load_state_dict(state)
    images, noise = torch.randn(2, 3, 16, 48), torch.rand(2, 12)
    torch.testing.assert_close(ours(images, noise=noise), other(images, noise=noise))


def test_mask_is_one_where_removed_and_the_smallest_noise_is_seen():
    noise = torch.rand(2, 16)
    loss, pred, mask = small()(torch.randn(2, 3, 32, 32), mask_ratio=0.7, noise=noise)
    assert (1 - mask).sum(1).tolist() == [4, 4]  # int(16 * 0.3)
    for values, removed in zip(noise, mask.bool(), strict=True):
        assert values[~removed].max() < values[removed].min()
    assert loss.shape == () and pred.shape == (2, 16, 192)


def test_removed_pixels_change_the_loss_only():
    model, noise = small(), torch.rand(1, 16)
    images = torch.randn(1, 3, 32, 32)
    loss, pred, mask = model(images, noise=noise)
    removed = model.unpatchify(mask[..., None].expand(-1, -1, 192))
    other = images + removed * torch.randn_like(images)
    other_loss, other_pred, _ = model(other, noise=noise)
    assert torch.equal(pred, other_pred) and loss != other_loss
    seen = images + (1 - removed)
    assert not torch.equal(pred, model(seen, noise=noise)[1])


@pytest.mark.parametrize("decoder_depth", [0, 1, 2])
@pytest.mark.parametrize("mask_in_encoder", [False, True])
def test_removed_only_has_the_same_loss_gradients_and_removed_pixels(
    mask_in_encoder, decoder_depth
):
    torch.manual_seed(0)
    kwargs = {"mask_in_encoder": mask_in_encoder, "decoder_depth": decoder_depth}
    model = small((24, 40), norm_pix_loss=True, **kwargs).double()
    images, noise = torch.randn(3, 3, 24, 40, dtype=torch.float64), torch.rand(3, 15)
    seen = []
    model.decoder_pred.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for block in model.decoder_blocks[-1:]:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))

    def run(**kwargs):
        model.zero_grad()
        seen.clear()
        loss, pred, mask = model(images, 0.6, noise, **kwargs)
        loss.backward()
        return loss, pred, mask, [p.grad for p in model.parameters() if p.requires_grad]

    loss, pred, mask, grads = run()
    assert seen == [16, 15][-len(seen) :]
    # Of 15 patches 6 stay; the last block's Mlp has the class token, too.
    few_loss, few_pred, few_mask, few_grads = run(removed_only=True)
    assert seen == [10, 9][-len(seen) :]
    assert torch.equal(few_mask, mask)
    torch.testing.assert_close(few_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(few_pred, pred * mask.unsqueeze(-1), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(few_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    model.set_grad_checkpointing()
    for ours, theirs in zip(run(removed_only=True)[3], grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_noise_is_drawn_from_torchs_generator():
    model, images = small(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    first = model(images)[2]
    second = model(images)[2]
    torch.manual_seed(1)
    assert torch.equal(first, model(images)[2])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size, patch", [((16, 24), 8), ((8, 24), (4, 6))])
def test_patchify_is_row_column_channel_and_unpatchify_its_inverse(size, patch):
    model = small(size, patch_size=patch)
    images = torch.randn(2, 3, *size)
    height, width = model.patch_size
    patches = model.patchify(images)
    block = images[1, :, :height, width : 2 * width]  # row 0, column 1
    assert torch.equal(patches[1, 1], block.permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_features_are_of_the_whole_image():
    theirs, ours = reference(32), small()
    ours.load_state_dict(official(theirs.state_dict()))
    theirs.config.mask_ratio = 0.0
    images = torch.randn(2, 3, 32, 32)
    tokens = theirs.vit(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    assert_relative(ours.features(images), tokens[:, 1:].mean(1), TOLERANCE)
    assert_relative(ours.features(images, pool="token"), tokens[:, 0], TOLERANCE)


def test_random_initialisation_is_the_papers():
    model = MaskedAutoencoderViT(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3)
    bounds = {"patch_embed.proj": (192, 192), "blocks.0.attn.qkv": (192, 576)}
    bounds |= {"decoder_embed": (192, 512), "decoder_blocks.0.mlp.fc1": (512, 2048)}
    for name, (fan_in, fan_out) in bounds.items():
        weight = model.get_submodule(name).weight
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not model.blocks[0].attn.qkv.bias.any()
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    # Column 1 of row 0 comes first in the channels: sin(1) leads the first half, 0 the second.
    assert model.pos_embed[0, 2, [0, 96]].tolist() == pytest.approx([0.841471, 0.0])


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = small()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Parameters of the released models: encoder (timm counts them too), decoder as released.
@pytest.mark.parametrize(
    "factory, encoder, total, tokens",
    [
        (mae_vit_base_patch16, 85_798_656, 111_907_840, 197),
        (mae_vit_large_patch16, 303_301_632, 329_541_888, 197),
        (mae_vit_huge_patch14, 630_764_800, 657_074_508, 257),
    ],
)
def test_factories_are_the_released_configurations(factory, encoder, total, tokens):
    with torch.device("meta"):
        model = factory()
    assert model.pos_embed.shape[1] == model.decoder_pos_embed.shape[1] == tokens
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    decoder = sum(n for name, n in sizes.items() if name.startswith(("decoder", "mask_token")))
    assert sum(sizes.values()) == total
    assert sum(sizes.values()) - decoder == encoder
    assert model.norm.eps == model.decoder_norm.eps == 1e-6
    assert len(model.decoder_blocks) == 8 and model.decoder_blocks[0].attn.num_heads == 16


def test_defaults_are_official_and_factories_take_overrides():
    with torch.device("meta"):
        model = MaskedAutoencoderViT()
        tiny = mae_vit_base_patch16(img_size=(64, 96), patch_size=8, depth=3, norm_pix_loss=True)
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (24, 1024, 16)
    assert model.norm.eps == 1e-5 and model.norm_pix_loss is False
    assert tiny.grid_size == (8, 12) and len(tiny.blocks) == 3 and tiny.norm_pix_loss
    assert mae_vit_base_patch16 is mae_vit_base_patch16_dec512d8b


@pytest.mark.parametrize("removed_only", [False, True])
@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
def test_compiles_into_one_graph(img_size, removed_only):
    model = small(32)
    images, noise = torch.randn(2, 3, *img_size), torch.rand(2, img_size[0] * img_size[1] // 64)
    call = {"noise": noise, "removed_only": removed_only}
    expected = model(images, **call)
    expected[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(images, **call)
    actual[0].backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, grads)


def test_bf16_autocast_keeps_the_loss_in_float32():
    model, images, noise = small(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected, _, _ = model(images, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, pred, mask = model(images, noise=noise)
    assert loss.dtype == mask.dtype == torch.float32 and pred.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_refuses_bad_arguments():
    model, images = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="divisible by 8 x 8, got 32 x 36"):
        model(torch.randn(1, 3, 32, 36))
    with pytest.raises(ValueError, match="divisible by 8 x 8, got 30 x 30"):
        small(30)
    with pytest.raises(ValueError, match="img_size must be a positive int or"):
        small((32, 32, 32))
    with pytest.raises(ValueError, match=r"noise must have shape \[2, 16\], got \[2, 17\]"):
        model(images, noise=torch.rand(2, 17))
    for mask_ratio in (0.0, 0.99, 1.0, -0.5):
        with pytest.raises(ValueError, match="mask_ratio must leave 1 to 15 of 16 patches"):
            model(images, mask_ratio=mask_ratio)
