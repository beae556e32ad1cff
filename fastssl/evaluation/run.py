"""All measures of one encoder, from features that are extracted once.

D feature dimensions. Under torch.distributed every rank calls `judge`, takes a share of the images
and gets what one process would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from fastssl import distributed
from fastssl.data import Batch
from fastssl.data.crops import Request
from fastssl.data.labelled import rank_requests
from fastssl.data.loader import CropsDataset, Loader, epoch_permutation
from fastssl.distributed import World
from fastssl.evaluation.datasets import EvaluationData
from fastssl.evaluation.encoder import Encoder, Extracted, extract
from fastssl.evaluation.finetune import FineTuneOptions, Pairs, fine_tune
from fastssl.evaluation.knn import knn_accuracies
from fastssl.evaluation.linear import linear_probe_accuracy
from fastssl.evaluation.low_shot import low_shot_accuracy
from fastssl.evaluation.measures import alignment, feature_std, rankme, uniformity
from fastssl.evaluation.sgd import SGDOptions
from fastssl.evaluation.sgd_probes import attentive_probe, sgd_probe
from fastssl.evaluation.shares import gather_rows
from fastssl.kernels.common.checks import check_int


@dataclass(frozen=True)
class Options:
    """measures: of `MEASURES`. labels_per_class, fractions: of low-shot, a row each; seeds: its
    splits. batch_size: images of a forward; that of a step of fine-tuning is in fine_tune."""

    measures: Sequence[str] = ("knn", "linear", "rankme", "std")
    ks: Sequence[int] = (10, 20)
    labels_per_class: Sequence[int] = (1, 5)
    fractions: Sequence[float] = (0.01, 0.1)
    seeds: Sequence[int] = (0, 1, 2)
    probe: SGDOptions = field(default_factory=SGDOptions)
    fine_tune: FineTuneOptions = field(default_factory=FineTuneOptions)
    batch_size: int = 256
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, 1)
        check_int("num_workers", self.num_workers, 0)
        for number in self.labels_per_class:
            check_int("labels_per_class", number, 1)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"fractions must be in (0, 1], got {fraction}")
        if not self.seeds:
            raise ValueError("seeds must be at least one, got none")
        for seed in self.seeds:
            check_int("seeds", seed, 0)
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ValueError(
                f"measures must be among {', '.join(MEASURES)}, got "
                f"{', '.join(map(str, unknown)) or 'none'}"
            )


def judge(encoder: Encoder, data: EvaluationData, options: Options, world: World) -> dict[str, Any]:
    """Each of options.measures, in that order, of an encoder in evaluation mode on world.device.

    Returns:
        {"measures": {name: number, or a group of numbers}, "features": D, "train", "test": numbers
        of images, "skipped": {path: reason} of those that could not be read}. Numbers are
        percentages, but for rankme, uniformity and std, which are of the test images' features, and
        alignment.
    """
    if "attentive" in options.measures:
        encoder.check_tokens()
    judgement = _Judgement(encoder, data, options, world)
    measures = {name: MEASURES[name](judgement) for name in dict.fromkeys(options.measures)}
    return {
        "measures": measures,
        "features": judgement.test.outputs[0].shape[1],
        "train": len(data.train),
        "test": len(data.test),
        "skipped": judgement.skipped,
    }


@dataclass(frozen=True)
class _Judgement:
    """What the measures share; extracted when first asked for."""

    encoder: Encoder
    data: EvaluationData
    options: Options
    world: World
    skipped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def train(self) -> Extracted:
        return self.extract(self._outputs, self.data.train)

    @cached_property
    def test(self) -> Extracted:
        return self.extract(self._outputs, self.data.test)

    def extract(
        self, function: Callable[[Batch], tuple[Tensor, ...]], dataset: CropsDataset
    ) -> Extracted:
        batch_size, num_workers = self.options.batch_size, self.options.num_workers
        extracted = extract(
            function, dataset, self.world, batch_size=batch_size, num_workers=num_workers
        )
        self.skipped.update(extracted.skipped)
        return extracted

    def _outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Features, and tokens where they are wanted."""
        features = self.encoder(batch.images)
        if "attentive" not in self.options.measures:
            return (features,)
        return features, self.encoder.tokens(batch.images)

    def sets(self, output: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        train, test = self.train, self.test
        return train.outputs[output], train.labels, test.outputs[output], test.labels


def _knn(judgement: _Judgement) -> dict[str, float]:
    accuracies = knn_accuracies(*judgement.sets(), judgement.options.ks)
    return {str(k): accuracy for k, accuracy in accuracies.items()}


def _linear(judgement: _Judgement) -> float:
    return linear_probe_accuracy(*(gather_rows(part) for part in judgement.sets()))


def _probe(judgement: _Judgement) -> dict[str, Any]:
    return asdict(sgd_probe(*judgement.sets(), judgement.options.probe))


def _attentive(judgement: _Judgement) -> dict[str, Any]:
    sets = judgement.sets(1)
    num_heads = math.gcd(8, sets[0].shape[2])
    return asdict(attentive_probe(*sets, judgement.options.probe, num_heads=num_heads))


def _low_shot(judgement: _Judgement) -> dict[str, Any]:
    """{"1 per class": {"linear": {mean, std, values}, "prototype": ...}, ..., "1 %": ...}; a number
    above that of the largest class says so."""
    options = judgement.options
    largest = int(gather_rows(judgement.train.labels).bincount().max())
    rows = {
        f"{n} per class" + f" (all, {largest} at most)" * (n > largest): {"per_class": n}
        for n in options.labels_per_class
    }
    rows |= {f"{100 * share:g} %": {"fraction": share} for share in options.fractions}
    result = {}
    for name, keywords in rows.items():
        spreads = low_shot_accuracy(*judgement.sets(), seeds=options.seeds, **keywords)
        result[name] = {kind: asdict(spread) for kind, spread in spreads.items()}
    return result


def _fine_tune(judgement: _Judgement) -> float:
    train = ShuffledBatches(judgement.data.augmented, judgement.options, judgement.world)
    accuracy = fine_tune(
        judgement.encoder.trainable_copy(),
        train,
        _TestBatches(judgement),
        num_features=judgement.test.outputs[0].shape[1],
        num_classes=len(judgement.data.classes),
        options=judgement.options.fine_tune,
    )
    for of_rank in distributed.gather(train.skipped):
        judgement.skipped.update(of_rank)
    return accuracy


def _alignment(judgement: _Judgement) -> float:
    def both(batch: Batch) -> tuple[Tensor, ...]:
        return tuple(judgement.encoder(view) for view in batch.views)

    return alignment(*judgement.extract(both, judgement.data.pairs).outputs)


def _of_test(function: Callable[..., float]) -> Callable[[_Judgement], float]:
    return lambda judgement: function(judgement.test.outputs[0], group=None)


MEASURES: dict[str, Callable[[_Judgement], Any]] = {
    "knn": _knn,
    "linear": _linear,
    "probe": _probe,
    "attentive": _attentive,
    "low-shot": _low_shot,
    "fine-tune": _fine_tune,
    "rankme": _of_test(rankme),
    "alignment": _alignment,
    "uniformity": _of_test(uniformity),
    "std": _of_test(feature_std),
}


class ShuffledBatches:
    """This rank's part of each batch of an epoch, perhaps empty; every iteration is the next epoch.

    skipped: {path: reason} of the files that this rank could not read.
    """

    def __init__(self, dataset: CropsDataset, options: Options, world: World) -> None:
        self._dataset, self._options, self._world = dataset, options, world
        self.skipped: dict[str, str] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._parts())

    def __iter__(self) -> Iterator[Pairs]:
        self._epoch += 1
        return _pairs(self._dataset, self._parts(), self._options, self._world, self.skipped)

    def _parts(self) -> list[tuple[Request, int]]:
        seed, rank, size = self._options.fine_tune.seed, self._world.rank, self._world.size
        order = epoch_permutation(len(self._dataset), seed=seed, epoch=self._epoch)
        parts = []
        for batch in order.split(self._options.fine_tune.batch_size):
            own = batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]
            # Without a share an image is read all the same: it tells the shape.
            request = Request((own if len(own) else batch[:1]).clone(), self._epoch)
            parts.append((request, len(own)))
        return parts


class _TestBatches:
    """This rank's share of the test images."""

    def __init__(self, judgement: _Judgement) -> None:
        self._dataset, self._world = judgement.data.test, judgement.world
        self._options, self._skipped = judgement.options, judgement.skipped

    def __iter__(self) -> Iterator[Pairs]:
        world = self._world
        requests = rank_requests(
            len(self._dataset), self._options.batch_size, world.rank, world.size
        )
        parts = [(request, len(request.indices)) for request in requests]
        return _pairs(self._dataset, parts, self._options, world, self._skipped)


def _pairs(
    dataset: CropsDataset,
    parts: list[tuple[Request, int]],
    options: Options,
    world: World,
    skipped: dict[str, str],
) -> Iterator[Pairs]:
    """The first so many images of each request; none where all files are broken, as a placeholder
    that keeps the ranks in step."""
    requests = [request for request, _ in parts]
    loader = Loader(dataset, requests, num_workers=options.num_workers, device=world.device)
    for (_, count), batch in zip(parts, loader, strict=True):
        skipped.update(batch.skipped or {})
        yield batch.images[:count], batch.labels[:count]
