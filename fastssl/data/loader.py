"""Batches in a global order that is a function of (seed, step), whatever reads them."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from fastssl import functional as F
from fastssl.data.batch import Batch
from fastssl.data.crops import PretrainingCrops, Request
from fastssl.data.pictures import ShardWindow
from fastssl.data.transforms import normalize
from fastssl.data.views import make_views


class CropsDataset(Protocol):
    """What a loader needs of a dataset."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, request: Request) -> Batch: ...


def num_samples(dataset: CropsDataset, global_batch_size: int) -> int:
    """Samples of an epoch, and hence different indices: the dataset, repeated as a whole until it
    fills a global batch."""
    return len(dataset) * -(-global_batch_size // len(dataset))


def steps_per_epoch(dataset: CropsDataset, global_batch_size: int) -> int:
    """Global batches in an epoch; the samples that do not fill one wait for another epoch."""
    return num_samples(dataset, global_batch_size) // global_batch_size


def epoch_permutation(
    num_samples: int, *, seed: int, epoch: int, window: ShardWindow | None = None
) -> Tensor:
    """[num_samples] int64, the order of the samples in an epoch.

    window: shards take turns in a random order, and a sample comes at a random place among the
        `num_open` turns that begin with its shard's; sample i is of picture i mod their number.
    """
    keys = _noise(num_samples, seed, epoch)
    if window is not None:
        starts = torch.from_numpy(window.starts)
        turns = _noise(len(starts) - 1, seed, epoch, view=1).argsort(stable=True).argsort()
        pictures = torch.arange(num_samples) % starts[-1]
        keys = turns[torch.searchsorted(starts, pictures, right=True) - 1] + window.num_open * keys
    return torch.argsort(keys, stable=True)


def _noise(number: int, seed: int, epoch: int, view: int = 0) -> Tensor:
    """[number] float64 of [0, 1)."""
    key = {"seed": seed, "epoch": epoch, "view": view, "stream": F.STREAM_SHUFFLE}
    noise = F.keyed_uniform(torch.arange(number), 2, **key).double()
    # A number has 24 bits, so that among thousands some are equal: two make 48.
    return noise[:, 0] + noise[:, 1] * 2.0**-24


class GlobalOrder(Sampler[Request]):
    """This rank's micro-batches of steps [start_step, num_steps).

    Step s takes positions [s' * G, (s' + 1) * G) of its epoch's permutation, s' being the step
    within the epoch; rank r of W the r-th contiguous slice of them; a micro-batch the next slice
    of that. The repeats of a sample follow it. Nothing is remembered from one step to the next.
    """

    def __init__(
        self,
        dataset: PretrainingCrops,
        *,
        global_batch_size: int,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        view: int = 0,
        keep_decoded: bool = False,
    ):
        if global_batch_size < 1 or global_batch_size % (world_size * accumulation):
            raise ValueError(
                "global_batch_size must be a positive multiple of ranks x accumulation = "
                f"{world_size} x {accumulation}, got {global_batch_size}"
            )
        if global_batch_size % dataset.repeats:
            raise ValueError(
                f"global_batch_size must be a multiple of repeats = {dataset.repeats}, got "
                f"{global_batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if not 0 <= start_step <= num_steps:
            raise ValueError(f"start_step must be in [0, {num_steps}], got {start_step}")
        self.num_samples = num_samples(dataset, global_batch_size)
        self.steps_per_epoch = self.num_samples // global_batch_size
        self.global_batch_size = global_batch_size
        self.steps = range(start_step, num_steps)
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.seed, self.view, self.keep_decoded = seed, view, keep_decoded
        self.repeats, self.window = dataset.repeats, dataset.files.window

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[Request]:
        micro_batch = self.global_batch_size // (self.world_size * self.accumulation)
        order, order_epoch = None, -1
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = epoch_permutation(
                    self.num_samples // self.repeats,
                    seed=self.seed,
                    epoch=epoch,
                    window=self.window,
                )
                order_epoch = epoch
            start = step_in_epoch * self.global_batch_size
            start += self.rank * self.accumulation * micro_batch
            for _ in range(self.accumulation):
                places = torch.arange(start, start + micro_batch)
                indices = order[places // self.repeats] + places % self.repeats * len(order)
                yield Request(indices, epoch, self.view, step, self.keep_decoded)
                start += micro_batch


class Loader:
    """Iterable of normalised batches on `device`; `skipped` collects {broken file: reason}."""

    def __init__(
        self,
        dataset: CropsDataset,
        requests: Sampler[Request],
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.mean, self.std = dataset.mean, dataset.std
        self.skipped: dict[str, str] = {}
        self._done = multiprocessing.RawValue(ctypes.c_bool, False)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_start_worker, done=self._done),
            pin_memory=self.device.type == "cuda",
            # The global generator stays where it is: a resumed run must find it there.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._done.value = False
        # Registered after multiprocessing's own, which terminates the workers, it comes before it.
        atexit.register(self._end)
        try:
            # Pixels travel as bytes, a quarter of the floats, to this process and the GPU.
            for batch in _moved(self._loader, self.device, self._made):
                self.skipped.update(batch.skipped or {})
                yield batch
        finally:
            self._end()

    def _made(self, batch: Batch) -> Batch:
        return replace(batch, views=self._views(batch), decoded=None)

    def _views(self, batch: Batch) -> tuple[Tensor, ...]:
        if batch.decoded is not None:
            return make_views(batch.decoded, mean=self.mean, std=self.std)
        # What is no picture comes as it is to be.
        return tuple(
            normalize(view, self.mean, self.std) if view.dtype == torch.uint8 else view
            for view in batch.views
        )

    def _end(self) -> None:
        """Let the workers go."""
        self._done.value = True
        atexit.unregister(self._end)


def _moved(
    batches: Iterable[Batch], device: torch.device, finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """The batches on `device`, finished there. For a GPU that happens to the next one while one is
    worked on, on a stream of its own: what the host waits for is of that stream alone."""
    if device.type != "cuda":
        yield from (finish(batch.to(device)) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    ready = None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = finish(batch.to(device, non_blocking=True)), stream.record_event()
        if ready is not None:
            yield _arrived(*ready)
        ready = following
    if ready is not None:
        yield _arrived(*ready)


def _arrived(batch: Batch, made: torch.cuda.Event) -> Batch:
    """For the current stream, which waits for this batch, not for the next."""
    current = torch.cuda.current_stream(batch.index.device)
    current.wait_event(made)
    # Its memory belongs to the other stream, which must not use it again before this one is done.
    batch.record_stream(current)
    return batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker_id: int, *, done: ctypes.c_bool) -> None:
    # More would compete with the other workers and with training for the same cores.
    torch.set_num_threads(1)
    if arrow := sys.modules.get("pyarrow"):
        arrow.set_cpu_count(1)
        arrow.set_io_thread_count(1)
    # Ctrl-C, torchrun and schedulers signal every process. The main one decides: it still needs
    # batches to finish its step. Once it is done it must be obeyed, or it would wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if done.value else None)


def build_loader(
    dataset: PretrainingCrops,
    *,
    global_batch_size: int,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    device: torch.device | str = "cpu",
    seed: int = 0,
    view: int = 0,
    views_on_device: bool | None = None,
) -> Loader:
    """The micro-batches of this rank for optimizer steps [start_step, num_steps), in order.

    The global batch of a step is the same for any number of ranks, micro-batches and workers. An
    epoch is floor(N / G) global batches of G of the N samples; fewer than G samples are repeated,
    each time with crops and an index of their own, rather than refused.

    prefetch: micro-batches that each worker has ready.
    views_on_device: workers decode only, and views are made where they are needed, all of one size
        in one launch. None: on a GPU. On a CPU the workers make them, and send bytes.

    Raises:
        ValueError: global_batch_size is no multiple of world_size * accumulation, or of repeats.
    """
    device = torch.device(device)
    requests = GlobalOrder(
        dataset,
        global_batch_size=global_batch_size,
        num_steps=num_steps,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        seed=seed,
        view=view,
        keep_decoded=device.type != "cpu" if views_on_device is None else views_on_device,
    )
    return Loader(dataset, requests, num_workers=num_workers, prefetch=prefetch, device=device)
