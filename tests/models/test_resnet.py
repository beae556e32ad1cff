"""ResNet against transformers' ResNet and torchvision's names, and by itself."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from fastssl.models import resnet
from fastssl.models.resnet import ResNet
from fastssl.nn import SyncBatchNorm
from tests.models.vit_keys import assert_relative

TINY = {"depths": (1, 2, 1, 1), "width": 4, "small_images": True}
RULES = [
    (r"^resnet\.embedder\.embedder\.convolution", "conv1"),
    (r"^resnet\.embedder\.embedder\.normalization", "bn1"),
    (r"^resnet\.encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"^classifier\.1", "fc"),
]


def torchvision_names(tensors):
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def tiny(**kwargs) -> ResNet:
    """A small model in which every normalisation does something of its own."""
    model = ResNet(**TINY | kwargs)
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind, expansion", [("basic", 1), ("bottleneck", 4)])
def test_parity_with_transformers(kind, expansion, training):
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8 * expansion * 2**stage for stage in range(4)],
        depths=[2, 1, 2, 1],
        layer_type=kind,
        num_labels=5,
    )
    theirs = transformers.ResNetForImageClassification(config).train(training)
    randomise(theirs)
    ours = ResNet((2, 1, 2, 1), kind == "bottleneck", num_classes=5, width=8).train(training)
    ours.load_state_dict(torchvision_names(theirs.state_dict()))
    images = torch.randn(4, 3, 70, 97)
    # Both count their batches in training, each forward once.
    with torch.no_grad():
        maps = theirs.resnet(images)
        assert_relative(ours.forward_features(images), maps.last_hidden_state, 1e-4)
    assert_relative(ours.features(images), theirs.resnet(images).pooler_output.flatten(1), 1e-4)
    actual, expected = ours(images), theirs(images).logits
    assert_relative(actual, expected, 1e-4)
    actual.square().sum().backward()
    expected.square().sum().backward()
    grads = torchvision_names({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert_relative(parameter.grad, grads[name], 1e-3, name)
    buffers = torchvision_names(dict(theirs.named_buffers()))
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-4, atol=1e-5)


def conv_and_norm(shapes, conv, norm, out_chans, in_chans, side):
    shapes[f"{conv}.weight"] = (out_chans, in_chans, side, side)
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{norm}.{name}"] = (out_chans,)
    shapes[f"{norm}.num_batches_tracked"] = ()


def test_resnet50_has_the_names_and_shapes_of_torchvision():
    expected = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    conv_and_norm(expected, "conv1", "bn1", 64, 3, 7)
    stages = [(3, 64, 64, 256), (4, 256, 128, 512), (6, 512, 256, 1024), (3, 1024, 512, 2048)]
    for stage, (depth, in_chans, width, out_chans) in enumerate(stages, start=1):
        for i in range(depth):
            block, chans = f"layer{stage}.{i}", in_chans if i == 0 else out_chans
            conv_and_norm(expected, f"{block}.conv1", f"{block}.bn1", width, chans, 1)
            conv_and_norm(expected, f"{block}.conv2", f"{block}.bn2", width, width, 3)
            conv_and_norm(expected, f"{block}.conv3", f"{block}.bn3", out_chans, width, 1)
        shortcut = f"layer{stage}.0.downsample"
        conv_and_norm(expected, f"{shortcut}.0", f"{shortcut}.1", out_chans, in_chans, 1)
    with torch.device("meta"):
        state = resnet.resnet50(num_classes=1000).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


# Parameters of torchvision's models with their 1000 classes.
@pytest.mark.parametrize(
    "name, num_features, parameters",
    [
        ("resnet18", 512, 11_689_512),
        ("resnet34", 512, 21_797_672),
        ("resnet50", 2048, 25_557_032),
        ("resnet101", 2048, 44_549_160),
    ],
)
def test_factories_are_the_published_networks(name, num_features, parameters):
    with torch.device("meta"):
        model = getattr(resnet, name)(num_classes=1000)
        bare = getattr(resnet, name)()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_features == num_features
    assert model.state_dict().keys() - bare.state_dict().keys() == {"fc.weight", "fc.bias"}


def test_wide_network_and_channels():
    with torch.device("meta"):
        model = resnet.resnet50(width=128, in_chans=4)
        features = model(torch.empty(2, 4, 64, 64))
    assert features.shape == (2, 4096) and model.num_features == 4096
    # ResNet-50 (2x) of SimCLR: 94 million parameters.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 94


@pytest.mark.parametrize("small_images, grid", [(False, (2, 3)), (True, (5, 9))])
def test_sides_of_the_feature_map(small_images, grid):
    model = ResNet((1, 1, 1, 1), width=4, small_images=small_images)
    images = torch.randn(2, 3, 40, 68)
    maps = model.forward_features(images)
    assert maps.shape == (2, 128, *grid)
    torch.testing.assert_close(model.eval()(images), model.forward_features(images).mean((2, 3)))


def test_small_images_stem_is_one_3x3_convolution():
    model = tiny().eval()
    assert model.conv1.weight.shape == (4, 3, 3, 3)
    seen = []
    model.layer1.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.layer1[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    images = torch.randn(1, 3, 9, 11)
    model(images)
    stem = nn.functional.conv2d(images, model.conv1.weight, padding=1)
    torch.testing.assert_close(seen[0], model.bn1(stem).relu())


@pytest.mark.parametrize("bottleneck", [False, True])
def test_zero_init_residual_starts_blocks_as_their_shortcut(bottleneck):
    for zero_init_residual in (True, False):
        model = ResNet((1, 2, 1, 1), bottleneck, width=4, zero_init_residual=zero_init_residual)
        for block in model.blocks:
            x = torch.randn(2, block.conv1.in_channels, 6, 6)
            same = torch.equal(block(x), block.downsample(x).relu())
            assert same == zero_init_residual
    assert isinstance(model.layer2[1].downsample, nn.Identity)


def test_init_weights_after_meta():
    with torch.device("meta"):
        model = ResNet(**TINY, num_classes=3)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(7)
    model.init_weights()
    conv = model.layer4[0].conv3.weight  # [128, 32, 1, 1], fan-out 128
    assert conv.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    norm = model.layer1[0].bn1
    for tensor, value in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0)):
        assert (tensor == value).all()
    assert (norm.running_var == 1).all() and norm.num_batches_tracked == 0
    assert (model.fc.weight.abs() <= 128**-0.5).all()


def step(model, images):
    """Loss of each image, gradients and buffers after one step."""
    torch.manual_seed(3)
    losses = model(images).square().sum(1)
    losses.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return losses.detach(), grads, dict(model.named_buffers())


def of_rank(model, images):
    model = SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return [step_of(model, images[dist.get_rank()], checkpoints) for checkpoints in (False, True)]


def step_of(model, images, checkpoints):
    model = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpoints)
    return step(model, images)


def test_two_processes_with_sync_batch_norm_equal_one(gloo_pool):
    model, images = tiny(depths=(1, 1, 1, 1)).double(), torch.randn(6, 3, 8, 8).double()
    losses, grads, buffers = step(copy.deepcopy(model), images)
    ranks = gloo_pool.run(of_rank, 2, model, images.split((4, 2)))
    for first, second in zip(*ranks, strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), losses)
        for name, grad in grads.items():
            torch.testing.assert_close(first[1][name] + second[1][name], grad)
        for name, buffer in buffers.items():
            torch.testing.assert_close(first[2][name], buffer)


def test_checkpointing_keeps_gradients_and_running_statistics():
    model, images = tiny(), torch.randn(4, 3, 16, 16)
    calls = []
    model.layer4[0].conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = step_of(model, images, False)
    assert len(calls) == 1
    actual = step_of(model, images, True)
    assert len(calls) == 3
    torch.testing.assert_close(actual, expected)
    assert actual[2]["layer4.0.bn1.num_batches_tracked"] == 1


def test_checkpointing_of_an_evaluated_model_with_a_frozen_stem():
    model, images = tiny().eval(), torch.randn(2, 3, 16, 16)
    model.conv1.requires_grad_(False)
    model.bn1.requires_grad_(False)
    expected = step_of(model, images, False)
    torch.testing.assert_close(step_of(model, images, True), expected)
    assert expected[1]["conv1.weight"] is None
    torch.testing.assert_close(expected[2], dict(model.named_buffers()))


@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiles_into_one_graph(checkpoints):
    model, images = tiny(depths=(1, 1, 1, 1), bottleneck=False), torch.randn(2, 3, 16, 16)
    expected = step_of(model, images, False)
    model.set_grad_checkpointing(checkpoints)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images).square().sum(1).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-4, atol=1e-5)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[2][name], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast():
    model, images = tiny(bottleneck=False).eval(), torch.randn(2, 3, 16, 16)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(images)
    assert_relative(actual.float(), expected, 3e-2)


@pytest.mark.parametrize("depths", [(1, 1, 1), (1, 1, 0, 1)])
def test_refuses_bad_depths(depths):
    with pytest.raises(ValueError, match="depths must be 4 positive ints, got"):
        ResNet(depths)
