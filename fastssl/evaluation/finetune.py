"""Fine-tuning an encoder with a linear classifier.

B images, D feature dimensions, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.evaluation.shares import check_labels, percent
from fastssl.kernels.common import collectives
from fastssl.kernels.common.checks import check_int
from fastssl.kernels.common.collectives import Group
from fastssl.losses.common import check_not_negative, check_positive
from fastssl.nn import SyncBatchNorm
from fastssl.optim import Schedule, build_adamw, set_hyperparameters

Pairs = tuple[Tensor, Tensor]  # images [B, ...], labels [B]


class Batches(Protocol):
    """As a list or a DataLoader: gone through once an epoch, of known length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Pairs]: ...


@dataclass(frozen=True)
class FineTuneOptions:
    """AdamW with layer-wise decay, a straight warm-up, then a cosine to 0; as MAE's for ViT-L.

    lr: of the top layer; that of a layer below is layer_decay times the one above.
    batch_size: images of a step over all ranks, for who makes the batches; `fine_tune` takes them
        as they are.
    dtype: of autocast, None for none.
    """

    lr: float = 1e-3
    epochs: int = 50
    warmup_epochs: int = 5
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    betas: Sequence[float] = (0.9, 0.999)
    label_smoothing: float = 0.1
    batch_size: int = 256
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, layer_decay=self.layer_decay)
        check_not_negative(weight_decay=self.weight_decay)
        check_int("epochs", self.epochs, 1)
        check_int("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0)
        betas = self.betas
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        if not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be numbers in [0, 1), got {betas!r}")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or None, got {self.dtype!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


_DEFAULT = FineTuneOptions()


class _Classifier(nn.Module):
    """The encoder and a linear classifier from zero, which needs no random numbers."""

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        like = next(encoder.parameters())
        self.head = nn.Linear(num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def fine_tune(
    encoder: nn.Module,
    train: Batches,
    test: Iterable[Pairs],
    *,
    num_features: int,
    num_classes: int,
    options: FineTuneOptions = _DEFAULT,
    group: Group = None,
) -> float:
    """Accuracy in percent on `test` after training all of `encoder`, in place, on `train`.

    Several ranks give batches of their own, of any size and number, and start from the same
    encoder, in no wrapper of DDP or FSDP. Step i learns from the i-th batches of all ranks as
    from one batch; gradients are averaged here. Dropout stays each rank's own, and so does
    BatchNorm, unless it is fastssl.nn.SyncBatchNorm: then all ranks must have as many batches,
    perhaps empty ones. A step without images is left out, and so is one of a single image under
    batch normalisation, which has no deviation to divide by.

    Args:
        encoder: images [B, ...] -> [B, D]; parameters that require no gradient stay as they are.
            Blocks are told by their names, as in `fastssl.optim.param_groups`.
        train, test: pairs of images [B, ...] and int64 labels [B] in [0, C), which are brought to
            the encoder's device. `train` may shuffle and augment anew each epoch.
        num_features: D.
        num_classes: C.
        options: the recipe. Dropout and stochastic depth draw from torch's generator, which is
            seeded here for each rank and put back afterwards.
        group: the ranks that take part; None is the default group, "" this process alone.
    """
    check_int("num_features", num_features, 1)
    check_int("num_classes", num_classes, 1)
    device = next(encoder.parameters()).device
    steps = torch.tensor(len(train), device=device)
    steps_per_epoch = int(collectives.all_reduce_max(steps, group))
    if steps_per_epoch == 0:
        raise ValueError("train must have at least one batch, got none")
    was_training = encoder.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed + collectives.rank(group))
        model = _Classifier(encoder, num_features, num_classes)
        _train(model, train, steps_per_epoch, options, group)
        accuracy = _accuracy(model, test, options, group)
    encoder.train(was_training)
    return accuracy


def _train(
    model: _Classifier,
    train: Batches,
    steps_per_epoch: int,
    options: FineTuneOptions,
    group: Group,
) -> None:
    optimizer = build_adamw(model, betas=options.betas, layer_decay=options.layer_decay)
    schedule = Schedule(
        base=options.lr, final=0.0, warmup_steps=options.warmup_epochs * steps_per_epoch
    )
    num_steps = options.epochs * steps_per_epoch
    smoothing = options.label_smoothing
    smallest = 2 if _has(model, _BatchNorm) else 1
    # A rank without images takes part in the others' statistics.
    takes_empty = _has(model, SyncBatchNorm)
    model.train()
    for epoch in range(options.epochs):
        # A rank whose batches have come to an end goes on without, for the others' sake.
        batches = itertools.chain(train, itertools.repeat(None))
        for step, batch in enumerate(itertools.islice(batches, steps_per_epoch)):
            count = 0 if batch is None else len(batch[1])
            total = _total(model, count, group)
            if total < smallest:
                continue
            lr = schedule(epoch * steps_per_epoch + step, num_steps)
            set_hyperparameters(optimizer, lr=lr, weight_decay=options.weight_decay)
            optimizer.zero_grad()
            if count or (takes_empty and batch is not None):
                logits, labels = _logits(model, batch, options.dtype)
                cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing).backward()
            _average_gradients(model, total, group)
            optimizer.step()


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _total(model: _Classifier, count: int, group: Group) -> int:
    """The sum of `count` over ranks."""
    number = torch.tensor(count, device=model.head.weight.device)
    return int(collectives.all_reduce_sum(number, group))


def _logits(model: _Classifier, batch: Pairs, dtype: torch.dtype | None) -> Pairs:
    """[B, C], in float32 at least, and the labels beside them."""
    device = model.head.weight.device
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    check_labels("labels", labels, images)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = model(images)
    num_classes = logits.shape[1]
    if (labels >= num_classes).any():
        raise ValueError(f"labels must be below {num_classes}, got {int(labels.max())}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), labels


def _average_gradients(model: nn.Module, total: int, group: Group) -> None:
    """Gradients of sums over this rank's samples -> of the mean over the `total` of all ranks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    # One collective carries all.
    flat = collectives.all_reduce_sum(torch.cat([g.flatten() for g in gradients]), group)
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = (part / total).view_as(parameter).to(parameter.dtype)


@torch.no_grad()
def _accuracy(
    model: _Classifier, test: Iterable[Pairs], options: FineTuneOptions, group: Group
) -> float:
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=model.head.weight.device)
    for batch in test:
        if len(batch[1]) == 0:
            continue
        logits, labels = _logits(model, batch, options.dtype)
        # A model that diverged is never right.
        right = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
        counts[0] += right.sum()
        counts[1] += len(labels)
    total = _total(model, int(counts[1]), group)
    if total == 0:
        raise ValueError("test must have at least one image, got none")
    return percent(counts[:1], total, group)[0]
