"""Checkpoints: all or nothing on disk, everything a run needs to go on as if never stopped.

A run's `checkpoints` folder holds

    step_00001000/             one checkpoint
        *.distcp, .metadata    tensors of model and optimizer, by torch.distributed.checkpoint
        rank_0.json, ...       states of that rank's random number generators
        state.json             format, step, shapes, what the position in the data depends on, and
                               size and SHA-256 of every other file

Teachers, centers and queues are tensors of the model; schedules and the place in the data follow
from the step. Tensors and JSON are all there is: nothing in a checkpoint is run when it is read
(checkpoint_reader.py).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from fastssl import distributed
from fastssl.optim.layerwise import local
from fastssl.training import checkpoint_files as files
from fastssl.training.checkpoint_files import complete
from fastssl.training.checkpoint_reader import CheckedReader, load_tensors, read_tensors
from fastssl.training.rng import rng_state, set_rng_state

__all__ = [
    "CheckedReader",
    "Checkpoints",
    "Outcome",
    "choose",
    "complete",
    "load_tensors",
    "newest",
    "read_tensors",
    "restore",
    "save_weights",
    "set_aside",
    "why_not_whole",
]

# For good: a thread that saves cannot change the filters for a while, they are the process's.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Outcome:
    """What became of a save; `error` says why there is no such checkpoint, None that there is."""

    step: int
    path: Path
    error: str | None


class Checkpoints:
    """Writes the checkpoints of a run, one at a time. All ranks call its methods alike.

    folder: one that all ranks see.
    keep: so many of the newest stay.
    asynchronous: `save` copies the tensors to memory of the CPU, which is kept for the next time,
        and a thread of each rank writes them and gives the checkpoint its name.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool = False) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._group = distributed.group_of_threads() if asynchronous else None
        self._thread = ThreadPoolExecutor(1) if asynchronous else None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._under_way: Future[Outcome] | None = None

    def save(
        self, step: int, method: nn.Module, optimizer: Optimizer, *, position: dict[str, Any]
    ) -> None:
        """Write the state after `step` optimizer steps; `outcome` has to be asked what came of it.

        position: what the place in the data depends on besides the step, as JSON can hold it;
            `restore` compares it.
        """
        assert self._under_way is None, "one at a time"
        tensors = _tensors(method, optimizer)
        shapes = {part: _shapes(named) for part, named in tensors.items()}
        state = {"step": step, "position": position, "shapes": shapes}
        if self._thread is None:
            self._under_way = Future()
            self._under_way.set_result(self._write(tensors, rng_state(), state))
        else:
            self._copies = {
                part: {name: self._copy(part, name, tensor) for name, tensor in named.items()}
                for part, named in tensors.items()
            }
            self._under_way = self._thread.submit(self._write, self._copies, rng_state(), state)

    def outcome(self, *, wait: bool = False) -> Outcome | None:
        """Of the save under way, once: None where there is none, or, unless `wait`, where some
        rank has not finished it."""
        if self._under_way is None:
            return None
        if not wait and distributed.any_rank(not self._under_way.done()):
            return None
        outcome = self._under_way.result()
        self._under_way = None
        return outcome

    def close(self) -> None:
        """Wait for what is under way."""
        if self._thread is not None:
            self._thread.shutdown()

    def _copy(self, part: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(part, {}).get(name)
        if copy is None:
            return tensor.detach().to("cpu", copy=True)
        # Into the memory of the last time: fresh memory costs several times the copy.
        local(copy).copy_(local(tensor))
        return copy

    def _write(
        self,
        tensors: dict[str, dict[str, Tensor]],
        generators: dict[str, Any],
        state: dict[str, Any],
    ) -> Outcome:
        """What fails on one rank fails on all, so that none is left waiting. A disk that is full,
        or gone for a while, is no reason to end a run."""
        final = self.folder / files.name_of(state["step"])
        writing = final.with_name(f"{final.name}.writing")
        error = None
        try:
            distributed.on_main(lambda: files.make_anew(writing), self._group)
            _save_tensors(writing, tensors, self._group)
            parts = distributed.gather(_own_files(writing, generators), self._group)
            for part in parts:
                if isinstance(part, OSError):
                    raise part
            checksums = {name: value for part in parts for name, value in part.items()}

            def publish() -> None:
                files.write_state(writing, state, checksums)
                files.publish(writing, final, self.keep)

            distributed.on_main(publish, self._group)
        except OSError as reason:
            error = str(reason)
            if _rank() == 0:
                shutil.rmtree(writing, ignore_errors=True)
        return Outcome(state["step"], final, error)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _tensors(method: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint. They share memory with the live ones: loading fills those.

    A sharded tensor is saved by the rank that has the shard, any other one by one rank.
    """
    names = {parameter: name for name, parameter in method.named_parameters()}
    state = {
        f"{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return {"model": method.state_dict(), "optimizer": state}


class _Writer(dcp.FileSystemWriter):
    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        with files.said_by_the_disk():
            return super().write_data(*args, **kwargs)

    def storage_meta(self) -> StorageMeta:
        # Without the path, of a class that no reader of tensors needs.
        return StorageMeta()


def _save_tensors(
    writing: Path, tensors: dict[str, dict[str, Tensor]], group: dist.ProcessGroup | None
) -> None:
    """OSError on all ranks where the disk failed one."""
    on_cpu = all(t.device.type == "cpu" for named in tensors.values() for t in named.values())
    # Looking ahead is for tensors of a GPU, whose context a thread would make for nothing else.
    ahead = {"per_thread_copy_ahead": 0} if on_cpu else {}
    try:
        dcp.save(tensors, storage_writer=_Writer(writing, **ahead), process_group=group)
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if all(isinstance(cause, OSError) for cause in causes):
            raise causes[0] from None
        # It is no Exception itself.
        raise RuntimeError(str(error)) from error


def _own_files(writing: Path, generators: dict[str, Any]) -> files.Checksums | OSError:
    """Checksums of what this rank wrote, its generators now included."""
    rank = _rank()
    try:
        files.write_json(writing / f"rank_{rank}.json", generators)
        names = [path.name for path in writing.glob(f"__{rank}_*.distcp")]
        names += [f"rank_{rank}.json"] + [files.METADATA] * (rank == 0)
        return files.checksums(writing, names)
    except OSError as error:
        return error


def choose(folder: Path, path: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: `path` if that is whole, or the `newest` of the folder."""
    if path is None:
        return newest(folder)
    path = path.expanduser().resolve()
    if reason := why_not_whole(path):
        raise ValueError(f"--resume must name a whole checkpoint; of {path} {reason}")
    return path, []


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`, from which a run goes on, and say so in sentences: they
    would be taken for newer than what it is going to save."""
    return [
        f"a checkpoint after step {step}, which the run goes on from, is set aside as {path}"
        for path in files.set_aside(folder, step)
    ]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder, and a sentence for each newer one that is not.

    None where there are no checkpoints at all. All ranks call this, and read a part each.

    Raises:
        ValueError: there are checkpoints, but not one is whole; or one is of another format.
    """
    skipped = []
    for path in reversed(distributed.on_main(lambda: files.named(folder))):
        reason = why_not_whole(path)
        if reason is None:
            return path, skipped
        skipped.append(f"skipping checkpoint {path}: {reason}")
    if skipped:
        raise ValueError(
            f"{folder} has no whole checkpoint to go on from ({'; '.join(skipped)}); "
            "overwrite=true without --resume starts anew"
        )
    return None, []


def why_not_whole(path: Path) -> str | None:
    """What is missing or changed in a checkpoint, compared with its checksums; None for nothing.

    All ranks call this, and read a part each. ValueError where it is of another format.
    """
    try:
        recorded = distributed.on_main(lambda: files.read_state(path))["files"]
    except files.NotWhole as error:
        return str(error)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    reason = None
    try:
        ours = sorted(recorded)[_rank() :: ranks]
        files.check_files(path, {name: recorded[name] for name in ours})
    except files.NotWhole as error:
        reason = str(error)
    return next((found for found in distributed.gather(reason) if found), None)


def restore(
    path: Path, method: nn.Module, optimizer: Optimizer, *, position: dict[str, Any]
) -> int:
    """Fill method, optimizer and generators from a whole checkpoint; returns its step.

    Any number of ranks may load what any other number wrote; ranks that the writer did not have
    keep the generators they have.

    Raises:
        ValueError: `position` differs from the saved one, so that the data would not go on where
            they stopped, or model, optimizer and checkpoint do not fit.
    """
    state = files.read_state(path)
    for key, value in position.items():
        if state["position"].get(key) != value:
            raise ValueError(
                f"{key} must be {state['position'].get(key)} to resume {path}, got {value}"
            )
    tensors = _tensors(method, optimizer)
    for part, named in tensors.items():
        _check_shapes(path, part, state["shapes"][part], _shapes(named))
    load_tensors(path, tensors)
    generators = f"rank_{_rank()}.json"
    if generators in state["files"]:
        set_rng_state(json.loads((path / generators).read_text(encoding="utf-8")))
    return state["step"]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _check_shapes(
    path: Path, part: str, saved: dict[str, list[int]], ours: dict[str, list[int]]
) -> None:
    """torch.distributed.checkpoint says nothing of tensors that only the checkpoint has."""
    for name in saved | ours:
        if saved.get(name) != ours.get(name):
            was, is_now = (shapes.get(name, "no such tensor") for shapes in (saved, ours))
            raise ValueError(
                f"the {part} does not fit the checkpoint {path}: {name} is {was} there, "
                f"{is_now} in the {part}"
            )


def save_weights(path: Path, model: nn.Module) -> None:
    """Write {"model": whole tensors on the CPU}, which `load_pretrained` reads; all ranks call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    distributed.on_main(lambda: _write_weights(path, weights))


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    writing = path.with_suffix(".writing")
    try:
        with files.said_by_the_disk(), open(writing, "wb") as file:
            torch.save({"model": weights}, file)
            file.flush()
            os.fsync(file.fileno())
        writing.rename(path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        writing.unlink(missing_ok=True)
