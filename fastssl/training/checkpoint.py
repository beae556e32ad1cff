"""Checkpoints: all or nothing on disk, everything a run needs to go on as if never stopped.

A run's `checkpoints` folder holds

    step_00001000/             one checkpoint
        *.distcp, .metadata    tensors of model and optimizer, by torch.distributed.checkpoint
        rank_0.json, ...       states of that rank's random number generators
        state.json             the step and what the position in the data depends on
    latest -> step_00001000    for people and scripts

It is written under another name, forced to the disk and renamed, so that one which is there is
whole. Nothing is pickled but torch's own `.metadata`.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from fastssl import distributed

_NAME = re.compile(r"step_(\d{8})")


def rng_state() -> dict[str, Any]:
    """States of this process's global generators, as JSON can hold them."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Afterwards the generators are where they were before."""
    state = rng_state()
    yield
    set_rng_state(state)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _tensors(method: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, torch.Tensor]]:
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


def save(
    folder: Path,
    step: int,
    method: nn.Module,
    optimizer: Optimizer,
    *,
    position: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after `step` optimizer steps; the `keep` newest checkpoints stay.

    `position` (JSON) is what the place in the data depends on besides the step; `restore` compares
    it. All ranks call this, with a folder that all see.
    """
    final = folder / f"step_{step:08d}"
    writing = folder / f"{final.name}.writing"
    distributed.on_main(lambda: _make_anew(writing))
    with _alone_is_fine():
        dcp.save(_tensors(method, optimizer), checkpoint_id=writing)
    rank = dist.get_rank() if dist.is_initialized() else 0
    _write_json(writing / f"rank_{rank}.json", rng_state())
    distributed.barrier()
    state = {"step": step, "position": position, "model": _shapes(method.state_dict())}
    distributed.on_main(lambda: _publish(writing, final, state, keep))
    return final


def save_weights(path: Path, model: nn.Module) -> None:
    """Write {"model": whole tensors on the CPU}, which `load_pretrained` reads; all ranks call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    distributed.on_main(lambda: _write_weights(path, weights))


def _write_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    writing = path.with_suffix(".writing")
    torch.save({"model": weights}, writing)
    writing.rename(path)


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _check_model(path: Path, saved: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    """torch.distributed.checkpoint says nothing of tensors that only the checkpoint has."""
    for name in saved | ours:
        if saved.get(name) != ours.get(name):
            was, is_now = (shapes.get(name, "no such tensor") for shapes in (saved, ours))
            raise ValueError(
                f"the model does not fit the checkpoint {path}: {name} is {was} there, "
                f"{is_now} in the model"
            )


def restore(
    path: Path, method: nn.Module, optimizer: Optimizer, *, position: dict[str, Any]
) -> int:
    """Fill method, optimizer and generators from a checkpoint; returns its step.

    Any number of ranks may load what any other number wrote; ranks that the writer did not have
    keep the generators they have.

    Raises:
        ValueError: `position` differs from the saved one, so that the data would not go on where
            they stopped, or model and checkpoint do not fit.
    """
    state = json.loads((path / "state.json").read_text())
    for key, value in position.items():
        if state["position"].get(key) != value:
            raise ValueError(
                f"{key} must be {state['position'].get(key)} to resume {path}, got {value}"
            )
    tensors = _tensors(method, optimizer)
    _check_model(path, state["model"], _shapes(tensors["model"]))
    try:
        with _alone_is_fine():
            dcp.load(tensors, checkpoint_id=path)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"the model does not fit the checkpoint {path}: {error}") from error
    rank = dist.get_rank() if dist.is_initialized() else 0
    generators = path / f"rank_{rank}.json"
    if generators.exists():
        set_rng_state(json.loads(generators.read_text()))
    return state["step"]


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """Without torch's warning that a process alone assumes to be alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; whatever else lies there is ignored."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if _NAME.fullmatch(path.name) and (path / "state.json").is_file()
    )


def _make_anew(path: Path) -> None:
    """An empty folder; what an interrupted save left is removed with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob("step_*.writing"):
        shutil.rmtree(left)
    path.mkdir()


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(writing: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    """Give a written checkpoint its name, then let go of the old ones."""
    _write_json(writing / "state.json", state)
    _sync(writing)
    if final.exists():
        shutil.rmtree(final)
    os.rename(writing, final)
    link = final.parent / "latest.writing"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.parent / "latest")
    _sync(final.parent)
    for old in complete(final.parent)[:-keep]:
        # Renamed first: half a removal must not look like a checkpoint.
        leaving = old.with_name(f"{old.name}.writing")
        os.rename(old, leaving)
        shutil.rmtree(leaving)


def _sync(folder: Path) -> None:
    """Force the folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
