"""The folder of a run, and the wish to stop one."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fastssl
from fastssl import distributed
from fastssl.data.index import write_whole
from fastssl.training.config import Config, dump


def open_run(config: Config, *, resume: bool) -> Path:
    """The run's folder, made if need be; `keep_config` makes it a run.

    Raises:
        FileExistsError: there is such a run and neither `resume` nor config.overwrite.
    """
    folder = Path(config.out).expanduser() / config.name
    distributed.on_main(lambda: _open(folder, config, resume))
    return folder


def _open(folder: Path, config: Config, resume: bool) -> None:
    is_run = (folder / "config.yaml").is_file()
    if folder.exists() and not is_run and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no run; choose another name=... or out=...")
    if is_run and not resume:
        if not config.overwrite:
            raise FileExistsError(
                f"run {folder} exists: go on with it by --resume, delete it by overwrite=true, "
                "or choose another name=..."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def keep_config(config: Config, folder: Path) -> None:
    """Write the resolved configuration into the run's folder."""
    text = dump(config).encode()
    file = folder / "config.yaml"
    distributed.on_main(lambda: write_whole(file, lambda stream: stream.write(text)))


def keep_versions(folder: Path, step: int, data: str) -> None:
    """Add a line to versions.jsonl: what goes on after `step` with which software, on what data."""
    distributed.on_main(lambda: _keep_versions(folder / "versions.jsonl", step, data))


def _keep_versions(file: Path, step: int, data: str) -> None:
    line = {
        "step": step,
        "fastssl": fastssl.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "data": data,
    }
    with open(file, "a" if step else "w", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def _commit() -> str | None:
    """Of the checkout that this package lies in, with "+changes" where files differ from it."""
    root = Path(fastssl.__file__).resolve().parents[1]
    # Installed into an environment inside of somebody's repository, that one's commit says nothing.
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.returncode else "")


class StopRequest:
    """Whether somebody asked for an end (SIGINT, SIGTERM) on any rank."""

    def __init__(self) -> None:
        self._here = False
        self._agreed = False

    def __call__(self) -> bool:
        """To be called by all ranks alike: they agree."""
        self._agreed = self._agreed or distributed.any_rank(self._here)
        return self._agreed

    def set(self) -> None:
        self._here = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM make a wish within; a second one in a process alone ends it at once."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may take signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def take(number: int, frame: object) -> None:
        stop.set()
        print("\nfinishing this step, then saving", file=sys.stderr, flush=True)
        # torchrun passes a signal on to ranks that had it from the terminal: there, twice is once.
        if not distributed.is_initialized():
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, take)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
