"""Residual networks for images, with torchvision's state-dict keys.

B images, C channels, h x w the sides of a feature map, D features of an image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.models.hub import HubModel
from fastssl.nn.checkpoint import BlockCheckpointing


@contextmanager
def untracked_batch_norm(module: nn.Module) -> Iterator[None]:
    """Batch normalisations in `module` leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    # Copies take the updates, so that autograd saves what it saves otherwise.
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class BatchNormCheckpointing(BlockCheckpointing):
    """For blocks with batch normalisation: what is computed again is counted once."""

    def _recomputation(self, block: nn.Module) -> dict[str, object]:
        # A compiled graph holds each update once, whatever it computes again.
        if torch.compiler.is_compiling():
            return {}
        return {"context_fn": lambda: (nullcontext(), untracked_batch_norm(block))}


def _conv(in_chans: int, out_chans: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, kernel_size, stride, kernel_size // 2, bias=False)


def _shortcut(in_chans: int, out_chans: int, stride: int) -> nn.Module:
    if stride == 1 and in_chans == out_chans:
        return nn.Identity()
    return nn.Sequential(_conv(in_chans, out_chans, 1, stride), nn.BatchNorm2d(out_chans))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut: [B, C, h, w] -> [B, width, h / stride, w / stride]."""

    expansion = 1

    def __init__(self, in_chans: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_chans, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_chans, width, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and the shortcut: [B, C, h, w] -> [B, 4 * width, ...].

    The 3x3 convolution has the stride, as in torchvision; in the paper it is the first one.
    """

    expansion = 4

    def __init__(self, in_chans: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(in_chans, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(in_chans, 4 * width, stride)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


class ResNet(nn.Module, BatchNormCheckpointing, HubModel):
    """Residual network (He et al., 2015, arXiv:1512.03385) of four stages, for images of any size.

    `depths` are the blocks of each stage, Bottleneck or with `bottleneck=False` BasicBlock. `width`
    is the stem's; the network "2x" of SimCLR has 128. `num_classes=0` leaves the classifier out.
    `small_images` puts a 3x3 convolution of stride 1 in place of the stem's 7x7 convolution and
    pooling, for images of 32 x 32 or so (SimCLR, Chen et al., 2020, arXiv:2002.05709, B.9).
    `zero_init_residual` starts every block as its shortcut (Goyal et al., 2017, arXiv:1706.02677),
    as most self-supervised training of ResNets does; torchvision's default is False.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = True,
        num_classes: int = 0,
        in_chans: int = 3,
        width: int = 64,
        small_images: bool = False,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths must be 4 positive ints, got {tuple(depths)}")
        self.zero_init_residual = zero_init_residual
        if small_images:
            self.conv1, self.maxpool = _conv(in_chans, width, 3), nn.Identity()
        else:
            self.conv1, self.maxpool = _conv(in_chans, width, 7, 2), nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(width)
        kind = Bottleneck if bottleneck else BasicBlock
        chans = width
        for stage, depth in enumerate(depths):
            blocks = nn.Sequential()
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(kind(chans, width * 2**stage, stride))
                chans = width * 2**stage * kind.expansion
            setattr(self, f"layer{stage + 1}", blocks)
        self.num_features = chans
        self.fc = nn.Linear(chans, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks of all stages, in order."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def init_weights(self) -> None:
        """Random initialisation as in torchvision; to be called again after `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.zero_init_residual:
            for block in self.blocks:
                nn.init.zeros_(block.last_norm.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map [B, D, h, w] of images [B, C, H, W]; h is about H / 32, or H / 8
        with `small_images`."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.maxpool(x)
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """Image features [B, D]: the mean of the last feature map."""
        return self.forward_features(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """fc(features): [B, num_classes], or [B, D] where `num_classes` is 0."""
        return self.fc(self.features(images))


def resnet18(**kwargs) -> ResNet:
    """ResNet-18, D = 512. Keywords as ResNet, for all factories."""
    return ResNet(**{"depths": (2, 2, 2, 2), "bottleneck": False} | kwargs)


def resnet34(**kwargs) -> ResNet:
    """ResNet-34, D = 512."""
    return ResNet(**{"depths": (3, 4, 6, 3), "bottleneck": False} | kwargs)


def resnet50(**kwargs) -> ResNet:
    """ResNet-50, D = 2048."""
    return ResNet(**{"depths": (3, 4, 6, 3)} | kwargs)


def resnet101(**kwargs) -> ResNet:
    """ResNet-101, D = 2048."""
    return ResNet(**{"depths": (3, 4, 23, 3)} | kwargs)
