"""Where the numbers of a run go: metrics.jsonl, CSV, TensorBoard, Weights & Biases.

All of them are on rank 0 only. A run that goes on after `start_step` is going to write the lines
beyond it again: they are dropped from the files when these are opened.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastssl.training.config import Config, LogConfig

# Packages beyond the trainer's own, by the key that wants them.
_EXTRAS = {"tensorboard": ("tensorboard", "train"), "wandb": ("wandb", "wandb")}


class Logger:
    """A place for lines of numbers, and for pictures where it can show them."""

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """A line of kind "train" or "eval", after `step` optimizer steps."""
        raise NotImplementedError

    def picture(self, step: int, name: str, path: Path) -> None:
        """A PNG that was drawn after `step` optimizer steps."""

    def close(self) -> None:
        """Nothing is written any more."""


def require(log: LogConfig) -> None:
    """ImportError that names the extra, where a logger's package is missing."""
    for key, (package, extra) in _EXTRAS.items():
        if getattr(log, key):
            try:
                importlib.import_module(package)
            except ImportError as error:
                message = f"log.{key}=true needs {package}: pip install 'fastssl[{extra}]'"
                raise ImportError(message) from error


def open_loggers(config: Config, folder: Path, start_step: int) -> list[Logger]:
    """Those that config.log asks for, and metrics.jsonl."""
    loggers: list[Logger] = [JsonLines(folder / "metrics.jsonl", start_step)]
    if config.log.csv:
        loggers.append(Csv(folder, start_step))
    if config.log.tensorboard:
        loggers.append(TensorBoard(folder / "tensorboard", start_step))
    if config.log.wandb:
        loggers.append(WeightsAndBiases(config, folder))
    return loggers


class JsonLines(Logger):
    """Lines {"step": optimizer steps done, "kind": "train" | "eval", ...}."""

    def __init__(self, path: Path, start_step: int) -> None:
        _keep_lines(path, lambda line: json.loads(line)["step"] <= start_step)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        # JSON has no word for what is not finite.
        known = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **known}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Csv(Logger):
    """A table for each kind, `metrics_train.csv` and `metrics_eval.csv`.

    A value that comes for the first time adds a column, which is empty in the rows before.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._columns: dict[str, list[str]] = {}
        for path in folder.glob("metrics_*.csv"):
            # No cell of ours holds a comma or a line's end.
            _keep_lines(
                path,
                lambda line: line.startswith("step") or int(line.split(",")[0]) <= start_step,
            )
            with open(path, encoding="utf-8", newline="") as file:
                self._columns[path.stem.removeprefix("metrics_")] = next(csv.reader(file), [])

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        path = self._folder / f"metrics_{kind}.csv"
        columns = self._columns.setdefault(kind, [])
        row = {"step": step, **values}
        if not set(row) <= set(columns):
            columns += [name for name in row if name not in columns]
            self._widen(path, columns)
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(row)

    @staticmethod
    def _widen(path: Path, columns: list[str]) -> None:
        rows: list[dict] = []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        wider = path.with_suffix(".wider")
        with open(wider, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(wider, path)


class TensorBoard(Logger):
    """Event files that `tensorboard --logdir` shows."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder))
        self._writer = self._open(purge_step=start_step + 1)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        with self._replaced_where_it_fails():
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        with self._replaced_where_it_fails():
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    @contextmanager
    def _replaced_where_it_fails(self) -> Iterator[None]:
        """A writer whose disk was full once fails for good; another takes what comes later."""
        try:
            yield
        except OSError:
            self._writer = self._open()
            raise

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """A run at Weights & Biases, in the project and entity of WANDB_PROJECT and WANDB_ENTITY.

    WANDB_MODE=offline keeps it in the run's folder, for `wandb sync`. A run that goes on is the
    same one there: its id is in wandb_id.txt.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        self._image: Callable[[str], Any] = wandb.Image
        file = folder / "wandb_id.txt"
        known = file.read_text(encoding="utf-8") if file.is_file() else None
        try:
            self._run = wandb.init(
                name=config.name,
                dir=str(folder),
                id=known,
                resume="allow",
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:
            raise ValueError(
                f"log.wandb=true: {error} (WANDB_MODE=offline needs neither account nor network)"
            ) from error
        file.write_text(self._run.id, encoding="utf-8")
        # Evaluations and training lines share the axis, and a resumed run repeats some of it.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"step": step, **named})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._image(str(path))})

    def close(self) -> None:
        self._run.finish()


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Keep the lines that `keep` can read and wants; one that a crash cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and keep(line):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    trimmed = path.with_suffix(".trimmed")
    trimmed.write_text("".join(kept), encoding="utf-8")
    os.replace(trimmed, path)
