"""Numbers of a run: gathered on the device, averaged over steps and ranks, handed on and shown."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl import distributed
from fastssl.distributed import World
from fastssl.training.config import Config
from fastssl.training.loggers import Logger, open_loggers

# What the progress line shows of a line of numbers, and how.
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("lr", "lr {:.1e}"),
    ("images_per_second", "{:.0f} images/s"),
    ("images_per_second_per_device", "{:.0f} a device"),
    ("data_wait", "data wait {:.0%}"),
    ("mfu", "MFU {:.1%}"),
    ("peak_memory_mb", "{:.0f} MB"),
    ("grad_norm", "grad {:.2g}"),
    ("knn", "k-NN {:.1f}%"),
    ("rankme", "RankMe {:.1f}"),
)


class Meter:
    """Means of scalars since the last `flush`; nothing waits for the device in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """The values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._count += 1

    def flush(self) -> dict[str, float]:
        """Mean over steps and ranks of each scalar; {} where none came."""
        means = distributed.mean({name: total / self._count for name, total in self._sums.items()})
        self._sums, self._count = {}, 0
        return means


class Clock:
    """Throughput and waiting since the last `flush`, less the time in `paused`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around reading a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def flush(self, num_images: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        waited = self._waited
        self._start, self._waited, self._paused = now, 0.0, 0.0
        return {"images_per_second": num_images / seconds, "data_wait": min(waited / seconds, 1.0)}


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB (2**20 bytes): of torch's CUDA allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Log:
    """The loggers and the progress line, on rank 0; on other ranks nothing.

    What the loggers are and which lines they drop is said in fastssl.training.loggers.
    """

    def __init__(self, run_dir: Path, config: Config, world: World, *, start_step: int) -> None:
        self._loggers: list[Logger] = []
        self._bar = None
        self._said: str | None = None
        self._evaluated: dict[str, float] = {}
        if not world.is_main:
            return
        self._loggers = open_loggers(config, run_dir, start_step)
        # Where nobody watches, a line now and then is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=config.train.steps,
            initial=start_step,
            mininterval=interval,
            file=sys.stderr,
            # No bar: its place is taken by the numbers.
            bar_format="step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """A line of numbers to all loggers."""
        if kind == "eval":
            self._evaluated = {k: v for k, v in values.items() if k in ("knn", "rankme")}
        self._to_all(step, lambda logger: logger.write(step, kind, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        """A PNG to the loggers that can show it."""
        self._to_all(step, lambda logger: logger.picture(step, name, path))

    def _to_all(self, step: int, tell: Callable[[Logger], None]) -> None:
        for logger in self._loggers:
            try:
                tell(logger)
            except OSError as error:
                # A disk that is full now is no reason to end the run; what was not written may be
                # lost.
                if str(error) != self._said:
                    self.say(f"warning: the metrics of step {step} could not be written: {error}")
                self._said = str(error)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the line to `step`, with the values of the last train line."""
        if self._bar is None:
            return
        if "loss" in values:
            self._bar.set_postfix_str(progress_line(self._evaluated | dict(values)), refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line for people, above the progress line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        for logger in self._loggers:
            try:
                logger.close()
            except OSError as error:
                self.say(f"warning: the last metrics could not be written: {error}")
        if self._bar is not None:
            self._bar.close()


def progress_line(values: Mapping[str, float]) -> str:
    """What is known of loss, speed, memory and quality, the most wanted first: a narrow terminal
    cuts the rest."""
    return ", ".join(form.format(values[name]) for name, form in _SHOWN if name in values)
