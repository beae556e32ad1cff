"""Runs in processes of their own, that can be killed: started in milliseconds from one that has
everything imported already."""

from __future__ import annotations

import json
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

from fastssl.training import loop
from fastssl.training.config import Config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.runs"])


def start(function, *args) -> BaseProcess:
    """`function(*args)` in a new process."""
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def run(config: Config, log: Path, environment: dict[str, str] | None = None) -> None:
    """Train, or go on; what is said goes to the file `log`."""
    os.environ.update(environment or {})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    loop.write_report = lambda folder: None
    loop.train(config, resume=True)


def last_step(folder: Path) -> int:
    """The last that is in the metrics; 0 before the first."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0
