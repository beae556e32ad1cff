"""The files of a run's checkpoints: names, checksums, and all or nothing on the disk.

    step_00001000/             one checkpoint, whole: it is written under another name, forced to
                               the disk and renamed
    step_00002000.writing/     one that is being written, or was when the process died
    step_00003000.aside/       one that a run did not go on from, and has yet to replace
    latest -> step_00001000    for people and scripts

Only what the process that saves or resumes on behalf of all does to the disk is here; who calls
what when is in checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fastssl

# Of state.json and of what lies beside it; to be raised when an older fastssl could not read it.
FORMAT = 1
STATE = "state.json"
METADATA = ".metadata"

_NAME = re.compile(r"step_(\d{8,})")

Checksums = dict[str, list]  # {file: [bytes, SHA-256 in hex]}


class NotWhole(ValueError):
    """A checkpoint with a file that is missing, cut short or changed; the text is the reason."""


def name_of(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step_{step:08d}"


def named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def complete(folder: Path) -> list[Path]:
    """Those of them that have their last file, oldest first; their content is not looked at."""
    return [path for path in named(folder) if (path / STATE).is_file()]


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def make_anew(path: Path) -> None:
    """An empty folder; what an interrupted save left is removed with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob("step_*.writing"):
        shutil.rmtree(left)
    path.mkdir()


@contextmanager
def said_by_the_disk() -> Iterator[None]:
    """Raises the OSError of a write within: torch's zip file fails once more when it is closed, by
    a RuntimeError that hides it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_json(path: Path, value: Any) -> None:
    """On the disk when it returns."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def checksums(folder: Path, names: Iterable[str]) -> Checksums:
    """Of files just written, so that they are read from memory. SHA-256 is what processors have
    instructions for: 1.4 GB/s on one core, where BLAKE2 makes 0.5."""
    return {name: [(folder / name).stat().st_size, _sha256(folder / name)] for name in names}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_state(folder: Path, state: dict[str, Any], files: Checksums) -> None:
    """The last file of a checkpoint, which makes it one."""
    state = {"format": FORMAT, "fastssl": fastssl.__version__, **state, "files": files}
    write_json(folder / STATE, {**state, "sha256": _sha256_of(state)})


def _sha256_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json.

    Raises:
        NotWhole: it is missing or damaged.
        ValueError: another fastssl wrote it, in a format that this one does not know.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotWhole(f"{STATE} is missing") from None
    except ValueError as error:
        raise NotWhole(f"{STATE} is no JSON: {error}") from None
    if not isinstance(state, dict):
        raise NotWhole(f"{STATE} must hold an object, got {type(state).__name__}")
    # Before the rest: another format may have another rest.
    written = state.get("format", 0)
    if written != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {written}, written by fastssl "
            f"{state.get('fastssl', 'of an earlier time')}; this fastssl, {fastssl.__version__}, "
            f"reads format {FORMAT}"
        )
    if state.pop("sha256", None) != _sha256_of(state):
        raise NotWhole(f"{STATE} does not have the checksum that it was written with")
    return state


def check_files(path: Path, files: Checksums) -> None:
    """NotWhole for the first of `files` that is not as it was written."""
    for name, (size, sha256) in files.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                raise NotWhole(f"{name} has {found} of {size} bytes")
            if _sha256(file) != sha256:
                raise NotWhole(f"{name} does not have the checksum that it was written with")
        except FileNotFoundError:
            raise NotWhole(f"{name} is missing") from None
        except OSError as error:
            raise NotWhole(f"{name} cannot be read: {error.strerror}") from None


def publish(writing: Path, final: Path, keep: int) -> None:
    """Give a written checkpoint its name, then let go of all but the `keep` newest."""
    sync(writing)
    if final.exists():
        shutil.rmtree(final)
    os.rename(writing, final)
    sync(final.parent)
    # It is saved. What follows can be done without, as links where a file system has none.
    with suppress(OSError):
        _point_to(final)
    shutil.rmtree(_aside(final), ignore_errors=True)
    for old in complete(final.parent)[:-keep]:
        # Renamed first: half a removal must not look like a checkpoint.
        leaving = old.with_name(f"{old.name}.writing")
        with suppress(OSError):
            os.rename(old, leaving)
        # The next save removes what cannot be removed now.
        shutil.rmtree(leaving, ignore_errors=True)


def _point_to(path: Path) -> None:
    link = path.with_name("latest.writing")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name("latest"))


def sync(folder: Path) -> None:
    """Force the folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, from which a run goes on: they would be taken for newer
    than what it is going to save. Returns the new names."""
    moved = []
    for path in named(folder):
        if step_of(path) > step:
            shutil.rmtree(_aside(path), ignore_errors=True)
            os.rename(path, _aside(path))
            moved.append(_aside(path))
    if moved and (folder / name_of(step)).is_dir():
        with suppress(OSError):
            _point_to(folder / name_of(step))
    return moved


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.aside")
