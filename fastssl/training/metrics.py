"""Numbers of a run: gathered on the device, averaged over steps and ranks, written and shown."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl import distributed
from fastssl.distributed import World


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
    """metrics.jsonl, TensorBoard and the progress bar, on rank 0; on other ranks nothing.

    Lines are {"step": optimizer steps done, "kind": "train" | "eval", ...}. Lines beyond
    `start_step`, which a resumed run is going to write again, are dropped.
    """

    def __init__(
        self, run_dir: Path, world: World, *, start_step: int, num_steps: int, tensorboard: bool
    ) -> None:
        self._file = self._board = self._bar = None
        if not world.is_main:
            return
        path = run_dir / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = open(path, "a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        # Where nobody watches, a line now and then is enough.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=num_steps, initial=start_step, unit="step", mininterval=interval, file=sys.stderr
        )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        # JSON has no word for what is not finite.
        known = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **known}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar to `step`, with the values of the last train line."""
        if self._bar is None:
            return
        if "loss" in values:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s, "
                f"data wait {values['data_wait']:.0%}, {values['peak_memory_mb']:.0f} MB",
                refresh=False,
            )
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        for part in (self._bar, self._board, self._file):
            if part is not None:
                part.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`; one that a crash cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    trimmed = path.with_suffix(".trimmed")
    trimmed.write_text("".join(kept), encoding="utf-8")
    os.replace(trimmed, path)
