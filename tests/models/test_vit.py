"""VisionTransformer against transformers' ViTModel and Dinov2Model, and by itself."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastssl import models
from fastssl.models import VisionTransformer
from fastssl.models.transformers_keys import official
from tests.models.vit_keys import assert_relative, randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
THEIRS = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3}
THEIRS |= {"num_attention_heads": 3, "layer_norm_eps": 1e-6}


def small(**kwargs) -> VisionTransformer:
    return VisionTransformer(**SMALL | kwargs)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_parity_with_transformers_vit(size):
    config = transformers.ViTConfig(**THEIRS, intermediate_size=96)
    theirs = transformers.ViTModel(config, add_pooling_layer=False)
    randomise(theirs)
    ours = small()
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    tokens = theirs(images, interpolate_pos_encoding=True).last_hidden_state
    assert_relative(ours.forward_features(images), tokens, 1e-4)
    assert_relative(ours(images), tokens[:, 0], 1e-4)
    assert_relative(ours.features(images), tokens[:, 1:].mean(1), 1e-4)


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_parity_with_transformers_dinov2(size, ffn_layer):
    config = transformers.Dinov2Config(**THEIRS, use_swiglu_ffn=ffn_layer == "swiglu")
    theirs = transformers.Dinov2Model(config)
    randomise(theirs)
    ours = small(init_values=1.0, use_mask_token=True, ffn_layer=ffn_layer)
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    masks = torch.rand(2, size[0] * size[1] // 64) < 0.4
    for masked in (None, masks):
        tokens = theirs(images, bool_masked_pos=masked).last_hidden_state
        actual = ours.forward_features(images, masks=masked)
        assert_relative(actual, tokens, 1e-4)
    actual.square().sum().backward()
    tokens.square().sum().backward()
    grads = official({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert_relative(parameter.grad, grads[name], 1e-4, name)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_parity_with_transformers_dinov2_registers(size):
    config = transformers.Dinov2WithRegistersConfig(**THEIRS, num_register_tokens=4)
    theirs = transformers.Dinov2WithRegistersModel(config)
    randomise(theirs)
    ours = small(
        init_values=1.0, use_mask_token=True, num_register_tokens=4, interpolate_antialias=True
    )
    ours.load_state_dict(official(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    tokens = theirs(images).last_hidden_state
    assert_relative(ours.forward_features(images), tokens, 1e-4)
    assert_relative(ours.features(images), tokens[:, 5:].mean(1), 1e-4)
    assert_relative(ours.features(images, pool="token"), tokens[:, 0], 1e-4)


def test_only_kept_patches_enter_with_their_own_positions():
    model = small(num_register_tokens=2)
    randomise(model)
    images = torch.randn(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    expected = model.forward_features(images)
    torch.testing.assert_close(model.forward_features(images, ids_keep=everything), expected)
    # Attention does not care for the order: permuted patches give permuted tokens.
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    permuted = model.forward_features(images, ids_keep=order)
    torch.testing.assert_close(permuted[:, :3], expected[:, :3])
    patches = expected[:, 3:].gather(1, order[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(permuted[:, 3:], patches)
    assert model.forward_features(images, ids_keep=order[:, :5]).shape == (2, 8, 24)


def test_patch_that_is_not_kept_has_no_influence():
    model = small()
    images = torch.randn(1, 3, 32, 32)
    ids_keep = torch.tensor([[5, 2, 9]])
    other = images.clone()
    other[..., :8, :8] = 7.0  # patch 0
    kept = model.forward_features(images, ids_keep=ids_keep)
    assert torch.equal(kept, model.forward_features(other, ids_keep=ids_keep))


def some_tokens(tokens):
    """The class tokens and two patches of the second image."""
    return torch.cat([tokens[:, 0], tokens.flatten(0, 1)[[21, 30]]])


# Rates at which samples are dropped after their branch is computed, and before.
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.08, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("init_values", [None, 0.3])
def test_selected_tokens_are_those_of_all(init_values, checkpointing, drop_path_rate):
    model = small(init_values=init_values, drop_path_rate=drop_path_rate).double().train()
    randomise(model)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    results = []
    for select in (some_tokens, None):
        torch.manual_seed(5)
        tokens = model.forward_features(images, select=select)
        tokens = tokens if select is not None else some_tokens(tokens)
        assert tokens.shape == (10, 24)
        loss = (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum()
        results.append((tokens, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results)


def test_the_last_block_spares_the_tokens_that_are_not_selected():
    model, images = small(), torch.randn(2, 3, 32, 32)
    flops = []
    for pool in ("avg", "token"):
        with FlopCounterMode(display=False) as counter:
            model.features(images, pool=pool)
        flops.append(counter.get_total_flops())
    # Of the projection, D x D, and of the Mlp, two of 4 * D x D, for 16 patches of 2 images.
    assert flops[0] - flops[1] == 2 * (2 * 16) * 9 * 24**2


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_head_reads_the_pooled_tokens(pool):
    model = small(num_classes=5, global_pool=pool)
    images = torch.randn(2, 3, 32, 32)
    pooled = model.features(images, pool=pool)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias)


def test_any_sides_channels_and_drop_path():
    model = small(img_size=(24, 40), patch_size=(4, 8), in_chans=1, drop_path_rate=0.2)
    assert model.grid_size == (6, 5)
    assert model.features(torch.randn(2, 1, 24, 40)).shape == (2, 24)
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_state_dict_has_the_official_keys():
    keys = set(small(init_values=0.1, num_register_tokens=4, use_mask_token=True).state_dict())
    assert {key for key in keys if not key.startswith("blocks.")} == {
        "cls_token",
        "pos_embed",
        "register_tokens",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    }
    assert {key for key in keys if key.startswith("blocks.2.")} == {
        f"blocks.2.{name}"
        for name in (
            *(f"{norm}.{x}" for norm in ("norm1", "norm2") for x in ("weight", "bias")),
            *(f"attn.{layer}.{x}" for layer in ("qkv", "proj") for x in ("weight", "bias")),
            *(f"mlp.{layer}.{x}" for layer in ("fc1", "fc2") for x in ("weight", "bias")),
            "ls1.gamma",
            "ls2.gamma",
        )
    }


# Parameters of the released encoders without a head: timm, dino, mae; dinov2 at 518 pixels.
DINOV2 = {"img_size": 518, "init_values": 1.0, "use_mask_token": True}
VIT_G = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglu"}


@pytest.mark.parametrize(
    "name, config, parameters",
    [
        ("vit_tiny", {}, 5_524_416),
        ("vit_small", {}, 21_665_664),
        ("vit_base", {}, 85_798_656),
        ("vit_large", {}, 303_301_632),
        ("vit_huge", {}, 630_764_800),
        ("vit_small_patch14", DINOV2, 22_056_576),
        ("vit_base_patch14", DINOV2, 86_580_480),
        ("vit_large_patch14", DINOV2, 304_368_640),
        ("vit_large_patch14", DINOV2 | VIT_G, 1_136_480_768),
    ],
)
def test_factories_are_the_released_configurations(name, config, parameters):
    with torch.device("meta"):
        model = getattr(models, name)(**config)
        wide = getattr(models, name)(img_size=(112, 224), depth=1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    side = 224 // model.patch_size[0]
    assert wide.grid_size == (side // 2, side)
    assert model.embed_dim == model.num_features and len(wide.blocks) == 1


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
@pytest.mark.parametrize("patch", [14, 16])
def test_named_patch_sizes(size, patch):
    with torch.device("meta"):
        named = getattr(models, f"vit_{size}_patch{patch}")(depth=1)
        plain = getattr(models, f"vit_{size}")(patch_size=patch, depth=1)
    assert named.patch_size == plain.patch_size == (patch, patch)
    assert named.embed_dim == plain.embed_dim


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = small(init_values=0.1, num_register_tokens=1, use_mask_token=True)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((24,), 0.1))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_compiles_into_one_graph(size):
    model = small()
    images = torch.randn(2, 3, *size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_refuses_bad_arguments():
    model, images = small(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="divisible by 8 x 8, got 36 x 32"):
        model(torch.randn(2, 3, 36, 32))
    with pytest.raises(ValueError, match="divisible by 8 x 8, got 33 x 33"):
        small(img_size=33)
    with pytest.raises(ValueError, match="patch_size must be a positive int or"):
        small(patch_size=0)
    with pytest.raises(ValueError, match="ffn_layer must be one of mlp, swiglu, got 'glu'"):
        small(ffn_layer="glu")
    with pytest.raises(ValueError, match="global_pool must be one of token, avg, got 'map'"):
        small(global_pool="map")
    with pytest.raises(ValueError, match="pool must be one of token, avg, got 'map'"):
        model.features(images, pool="map")
    with pytest.raises(ValueError, match="use_mask_token=True"):
        model.forward_features(images, masks=torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot be given together"):
        model.forward_features(
            images, masks=torch.ones(2, 16, dtype=torch.bool), ids_keep=torch.zeros(2, 1).long()
        )
