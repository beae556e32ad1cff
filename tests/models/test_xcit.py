"""XCiT against the formulas of its paper, outputs of the official code, and by itself."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.models import xcit
from fastssl.models.xcit import (
    ClassAttention,
    ClassAttentionBlock,
    ConvPatchEmbed,
    CrossCovarianceAttention,
    FourierPosition,
    LocalPatchInteraction,
    XCABlock,
    XCiT,
)
from fastssl.nn import LAYER_NORM, SyncBatchNorm
from tests.models.vit_keys import assert_relative

TINY = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "eta": 0.5}


def tiny(**kwargs) -> XCiT:
    return XCiT(**TINY | kwargs)


def randomise(model: nn.Module) -> nn.Module:
    """Random numbers of a size that makes every part matter."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            scale = name.endswith("running_var") or "temperature" in name
            scale = scale or (tensor.dim() == 1 and name.endswith("weight"))
            nn.init.uniform_(tensor, 0.5 if scale else -0.5, 1.5 if scale else 0.5)
    return model


def heads(module, x):
    """q, k and v, each [B, H, N, d]."""
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias)
    return qkv.reshape(*x.shape[:2], 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)


def test_cross_covariance_attention_is_the_formula():
    module = randomise(CrossCovarianceAttention(12, 3)).double()
    x = torch.randn(2, 7, 12).double()
    q, k, v = heads(module, x)
    q = q / q.square().sum(2, keepdim=True).sqrt()
    k = k / k.square().sum(2, keepdim=True).sqrt()
    scores = torch.einsum("bhni,bhnj->bhij", q, k) * module.temperature
    out = torch.einsum("bhij,bhnj->bnhi", scores.softmax(3), v).reshape(2, 7, 12)
    expected = out @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x), expected)


def test_cross_covariance_attention_moves_with_its_tokens():
    module, x = randomise(CrossCovarianceAttention(12, 3)), torch.randn(2, 9, 12)
    order = torch.randperm(9)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    torch.testing.assert_close(module(x.flip(0)), module(x).flip(0))


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_class_attention_is_the_formula(qkv_bias):
    module = randomise(ClassAttention(12, 3, qkv_bias)).double()
    x = torch.randn(2, 7, 12).double()
    assert (module.qkv.bias is not None) == qkv_bias
    q, k, v = heads(module, x)
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / 4**0.5
    out = torch.einsum("bhn,bhnd->bhd", scores.softmax(2), v).reshape(2, 1, 12)
    torch.testing.assert_close(module(x), out @ module.proj.weight.T + module.proj.bias)


def test_class_attention_does_not_care_for_the_order_of_patches():
    module, x = randomise(ClassAttention(12, 3)), torch.randn(2, 9, 12)
    permuted = torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(8)]], dim=1)
    torch.testing.assert_close(module(permuted), module(x))
    assert not torch.allclose(module(x.flip(1)), module(x))


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_class_attention_block_is_the_formula(tokens_norm):
    block = randomise(ClassAttentionBlock(8, 2, 2.0, True, 1.0, tokens_norm, LAYER_NORM))
    x = torch.randn(2, 5, 8)
    normed = block.norm1(x)
    token = x[:, :1] + block.gamma1 * block.attn(normed)
    token = block.norm2(token)
    token = token + block.gamma2 * block.mlp(token)
    patches = x[:, 1:] + block.gamma1 * normed[:, 1:]
    patches = 2 * (block.norm2(patches) if tokens_norm else patches)
    torch.testing.assert_close(block(x), torch.cat([token, patches], dim=1))


def test_local_patch_interaction_is_the_formula():
    module = randomise(LocalPatchInteraction(3)).double()
    x = torch.randn(2, 4, 5, 3).double()

    def depthwise(conv, x):
        """Sum over the 3 x 3 neighbours, each channel with its own weights."""
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        shifted = [padded[:, i : i + 4, j : j + 5] for i in range(3) for j in range(3)]
        weights = conv.weight.flatten(1).unbind(1)
        return sum(w * s for w, s in zip(weights, shifted, strict=True)) + conv.bias

    y = depthwise(module.conv1, x)
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2), correction=0)
    y = (y - mean) / (var + 1e-5).sqrt() * module.bn.weight + module.bn.bias
    torch.testing.assert_close(module(x), depthwise(module.conv2, y))


def test_block_adds_its_three_branches_in_order():
    block = randomise(XCABlock(8, 2, 2.0, True, 1.0, 0.0, LAYER_NORM)).eval()
    x = torch.randn(2, 3, 5, 8)
    y = x + block.gamma1 * block.attn(block.norm1(x).flatten(1, 2)).view(x.shape)
    y = y + block.gamma3 * block.local_mp(block.norm3(y))
    y = y + block.gamma2 * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y)


def test_drop_path_keeps_or_drops_branches_of_a_sample():
    block = randomise(XCABlock(8, 2, 2.0, True, 1.0, 0.5, LAYER_NORM))
    block.local_mp.bn.momentum = 1.0
    x = torch.randn(1, 2, 2, 8).expand(64, -1, -1, -1)
    y = block(x)
    kept = len(y.flatten(1).unique(dim=0))
    assert 2 < kept <= 64
    # A sample in eight loses all three branches.
    assert 1 <= (y == x).all(3).all(2).all(1).sum() <= 24
    # Statistics are those of all samples, also of the ones that drop the branch.
    assert block.local_mp.bn.num_batches_tracked == 1
    torch.testing.assert_close(block.eval()(x)[0], block(x[:1])[0])


def test_position_is_the_formula():
    module = randomise(FourierPosition(6, hidden_dim=4, temperature=100.0))
    waves = torch.empty(3, 5, 8)
    for row in range(3):
        for column in range(5):
            for i, share in enumerate(((row + 1) / 3, (column + 1) / 5)):
                for j in range(4):
                    wave = math.cos if j % 2 else math.sin
                    angle = 2 * math.pi * share / 100 ** (j // 2 * 2 / 4)
                    waves[row, column, 4 * i + j] = wave(angle)
    conv = module.token_projection
    expected = waves @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(module((3, 5)), expected[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size, widths", [(8, (3, 4, 8, 16)), (16, (3, 2, 4, 8, 16))])
def test_patch_embedding_is_a_stack_of_convolutions(patch_size, widths):
    module = randomise(ConvPatchEmbed(3, 16, patch_size)).eval()
    images = torch.randn(2, 3, 32, 48)
    x, state = images, module.state_dict()
    for i, chans in enumerate(widths[1:]):
        weight = state[f"proj.{2 * i}.0.weight"]
        assert weight.shape == (chans, widths[i], 3, 3)
        x = F.conv2d(x, weight, stride=2, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(state[f"proj.{2 * i}.1.{name}"] for name in names))
        x = F.gelu(x) if chans < 16 else x
    torch.testing.assert_close(module(images), x.permute(0, 2, 3, 1))


# Logits of the official implementation with the weights and images of `waves`.
OFFICIAL = {
    (True, False): [[-0.4129, -1.2117, -0.8743], [-0.4061, -1.2139, -0.8834]],
    (True, True): [[-0.2532, -1.0012, -0.8186], [-0.1476, -0.8628, -0.7826]],
    (False, False): [[-0.4139, -1.2153, -0.8771], [-0.4068, -1.2169, -0.8857]],
    (False, True): [[-0.2534, -1.0029, -0.8201], [-0.1467, -0.8640, -0.7847]],
}


def waves(tensor, frequency, phase=0):
    numbers = torch.arange(tensor.numel(), dtype=torch.float64)
    return torch.sin(frequency * numbers + phase).view(tensor.shape)


@pytest.mark.parametrize("tokens_norm, training", OFFICIAL)
def test_logits_of_the_official_implementation(tokens_norm, training):
    model = tiny(patch_size=8, num_classes=3, eta=0.7, tokens_norm=tokens_norm).train(training)
    for i, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            is_scale = tensor.dim() == 1 and name.endswith("weight")
            offset = 1.0 if is_scale or name.endswith("running_var") else 0.0
            tensor.copy_(0.3 * waves(tensor, 1.7, i) + offset)
    images = waves(torch.empty(2, 3, 16, 24), 0.37).float()
    expected = torch.tensor(OFFICIAL[tokens_norm, training])
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (40, 8)])
def test_shapes(size, patch_size):
    model, images = tiny(patch_size=patch_size, num_classes=3, in_chans=2), torch.randn(2, 2, *size)
    num_patches = size[0] * size[1] // patch_size**2
    assert model.forward_features(images).shape == (2, 1 + num_patches, 8)
    assert model.features(images).shape == (2, 8)
    assert model(images).shape == (2, 3)


def test_head_reads_the_normed_class_token():
    model, images = randomise(tiny(num_classes=3)).eval(), torch.randn(2, 3, 16, 24)
    token = model.forward_features(images)[:, 0]
    assert torch.equal(model.features(images), token)
    torch.testing.assert_close(model(images), token @ model.head.weight.T + model.head.bias)
    model.head = nn.Identity()
    assert torch.equal(model(images), token)


def test_patches_are_in_row_major_order_and_have_positions():
    model = randomise(tiny(cls_attn_layers=0, depth=0)).eval()
    images = torch.zeros(1, 3, 16, 24)
    plain = model.forward_features(images)[0, 1:].unflatten(0, (4, 6))
    images[:, :, 8:, 20:] = 1.0
    changed = (model.forward_features(images)[0, 1:].unflatten(0, (4, 6)) - plain).abs().sum(2) > 0
    # Of 4 x 6 patches the lower two in the last column, and those whose convolutions reach them.
    assert changed[2:, 5].all() and not changed[0].any() and not changed[:, :4].any()
    assert not torch.allclose(plain[1, 1], plain[2, 2])


def test_gradients_reach_every_parameter():
    model = randomise(tiny(num_classes=3))
    model(torch.randn(2, 3, 16, 24)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-6, name


def test_state_dict_has_the_official_keys():
    keys = {key for key in tiny(num_classes=3).state_dict() if "num_batches" not in key}
    affine, norm = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")

    def named(prefix, layers, names=affine):
        return {f"{prefix}{layer}.{name}" for layer in layers for name in names}

    expected = {"cls_token"} | named("", ["norm", "head", "pos_embeder.token_projection"])
    for i in (0, 2):
        expected |= {f"patch_embed.proj.{i}.0.weight"}
        expected |= named("patch_embed.proj.", [f"{i}.1"], norm)
    attention = ["norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    for i in range(2):
        block, last = f"blocks.{i}.", f"cls_attn_blocks.{i}."
        expected |= named(block, [*attention, "norm3", "local_mp.conv1", "local_mp.conv2"])
        expected |= named(block, ["local_mp.bn"], norm) | named(last, attention)
        expected |= {block + name for name in ("attn.temperature", "gamma1", "gamma2", "gamma3")}
        expected |= {last + name for name in ("gamma1", "gamma2")}
    assert keys == expected


# Parameters of the official models with their 1000 classes.
@pytest.mark.parametrize(
    "name, patch16, patch8",
    [
        ("xcit_nano_12", 3_053_224, 3_049_016),
        ("xcit_tiny_12", 6_716_272, 6_706_504),
        ("xcit_small_12", 26_253_304, 26_213_032),
        ("xcit_small_24", 47_671_384, 47_631_112),
        ("xcit_medium_24", 84_395_752, 84_323_624),
    ],
)
def test_factories_are_the_released_configurations(name, patch16, patch8):
    for patch_size, parameters in ((16, patch16), (8, patch8)):
        with torch.device("meta"):
            model = getattr(xcit, name)(patch_size, num_classes=1000)
            named = getattr(xcit, f"{name}_p{patch_size}", None)
            short = (named or getattr(xcit, name))(depth=1)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.patch_size == (patch_size, patch_size)
        assert model.num_features == model.embed_dim and len(short.blocks) == 1
        assert short.patch_size == (patch_size if named else 16,) * 2
        assert model.blocks[0].eta == (1.0 if "12" in name else 1e-5)
        assert model.cls_attn_blocks[0].tokens_norm == ("nano" not in name)


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = tiny(num_classes=3)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(7)
    model.init_weights()
    assert not any((tensor == 7).any() for tensor in (*model.parameters(), *model.buffers()))
    block = model.blocks[0]
    assert (block.gamma3 == 0.5).all() and (block.attn.temperature == 1).all()
    assert (block.local_mp.bn.running_var == 1).all() and (model.head.bias == 0).all()


def step(model, images):
    """Loss, gradients and buffers after one step."""
    torch.manual_seed(3)
    loss = model(images).square().sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), grads, dict(model.named_buffers())


@pytest.mark.parametrize("sync", [False, True])
def test_checkpointing_keeps_gradients_and_running_statistics(sync):
    model, images = randomise(tiny(drop_path_rate=0.3)), torch.randn(4, 3, 16, 24)
    if sync:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    calls = []
    model.blocks[1].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = step(copy.deepcopy(model), images)
    assert len(calls) == 1
    model.set_grad_checkpointing()
    actual = step(model, images)
    assert len(calls) == 3
    torch.testing.assert_close(actual, expected)
    assert actual[2]["blocks.1.local_mp.bn.num_batches_tracked"] == 1


@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiles_into_one_graph(checkpoints):
    model, images = randomise(tiny(depth=1, cls_attn_layers=1)), torch.randn(2, 3, 8, 24)
    expected = step(copy.deepcopy(model), images)
    model.set_grad_checkpointing(checkpoints)
    torch.compiler.reset()
    actual = step(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    torch.testing.assert_close(actual[0], expected[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-4, atol=1e-4)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[2][name])


def test_bfloat16_autocast():
    model, images = randomise(tiny()), torch.randn(2, 3, 16, 24)
    dtypes = []
    for block in (*model.blocks, *model.cls_attn_blocks):
        block.register_forward_pre_hook(lambda _, x: dtypes.append(x[0].dtype))
    expected = model.eval()(images)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(images)
        model.train()(images).sum().backward()
    # The residual stream is float32 from the first block on.
    assert set(dtypes) == {torch.float32}
    assert_relative(actual.float(), expected, 3e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_refuses_bad_arguments():
    model = tiny()
    with pytest.raises(ValueError, match="divisible by 4 x 4, got 16 x 18"):
        model(torch.randn(1, 3, 16, 18))
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\], got \[1, 4, 8"):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="patch_size must be a power of 2 from 2 on, got 12"):
        tiny(patch_size=12)
    with pytest.raises(ValueError, match="embed_dim must be divisible by 8, got 12"):
        tiny(patch_size=16, embed_dim=12)
    with pytest.raises(ValueError, match="dim must be divisible by num_heads=3, got 8"):
        tiny(num_heads=3)
