"""What several methods share. B images, V views, D features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.methods.base import Method, Setting
from fastssl.optim import EMA
from fastssl.optim.schedules import Schedule


def num_features(setting: Setting) -> int:
    """The width D of the encoder's output: its `num_features`, or what it makes of an image."""
    encoder = setting.encoder
    width = getattr(encoder, "num_features", None)
    if isinstance(width, int):
        return width
    parameter = next(encoder.parameters())
    images = torch.zeros(1, 3, *setting.views[0].size, device=parameter.device)
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        features = encoder(images)
    encoder.train(training)
    if not isinstance(features, Tensor) or features.dim() != 2:
        came = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            "model.name must build an encoder that returns a feature vector [B, D] of images "
            f"[B, C, H, W], got {came}"
        )
    return features.shape[1]


def encode(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """Outputs [V * B, D], views one after the other; views of one size go through together."""
    outputs = [
        network(torch.cat(list(group))) for _, group in groupby(views, key=lambda v: v.shape[2:])
    ]
    return torch.cat(outputs)


def encode_patches(network: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Features [B, P, D] of patches [B, P, C, H, W], which go through patch after patch, each of
    all images, as `keyed_drops` wants it."""
    features = network(patches.transpose(0, 1).flatten(0, 1))
    return features.unflatten(0, (patches.shape[1], patches.shape[0])).transpose(0, 1)


def check_views(setting: Setting, method: str, number: int, *, at_least: bool = False) -> None:
    """ValueError unless a batch has this many views."""
    if setting.num_views != number and not (at_least and setting.num_views > number):
        few = "at least " if at_least else ""
        raise ValueError(
            f"views.groups must make {few}{number} views of a sample for {method}, "
            f"got {setting.num_views}"
        )


def check_ratio(mask_ratio: float) -> None:
    """ValueError unless something is hidden, and something is not."""
    if not 0 < mask_ratio < 1:
        raise ValueError(f"method.args.mask_ratio must be between 0 and 1, got {mask_ratio}")


def rotations(images: Tensor) -> Tensor:
    """[B, C, S, S] -> [4, B, C, S, S], turned anticlockwise by 0, 90, 180 and 270 degrees."""
    return torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)])


def cut(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """[B, C, H, W] and upper left corners [B, P, 2], (row, column), int64 -> [B, P, C, size, size]:
    squares of each image."""
    inside = torch.arange(size, device=images.device)
    rows, columns = (corners[..., None] + inside).unbind(2)  # [B, P, size]
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images.movedim(1, 3)[image, rows[..., :, None], columns[..., None, :]].movedim(4, 2)


class TeacherMethod(Method):
    """A method whose `teacher` follows its `student`, a module of the same make, once per step.

    A subclass builds the student and calls `make_teacher`. The teacher has no stochastic depth,
    and batch statistics of its own.
    """

    schedules: ClassVar[Mapping[str, Schedule]] = {
        "teacher_momentum": Schedule(0.996, final=1.0),
    }
    student: nn.Module
    teacher: nn.Module

    def make_teacher(self, student: nn.Module) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        for module in self.teacher.modules():
            # By name, so that those of other libraries are meant, too.
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
        self._momentum = 1.0
        self._ema: EMA | None = None

    def before_step(self, values: Mapping[str, float]) -> None:
        super().before_step(values)
        self._momentum = values["teacher_momentum"]

    def after_step(self) -> None:
        super().after_step()
        if self._ema is None:
            # Not before everything that replaces modules or parameters is done.
            self._ema = EMA(self.teacher, self.student, buffers="keep")
        self._ema.step(self._momentum)
