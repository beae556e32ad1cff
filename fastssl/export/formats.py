"""The formats of an export, each a folder with a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastssl.export.card import Usage, write_card, write_preprocessing
from fastssl.export.onnx_file import write_onnx
from fastssl.export.run import TrainedRun, backbone
from fastssl.export.transformers_folder import write_transformers
from fastssl.models import MaskedAutoencoderHiera
from fastssl.models.hub import WEIGHTS, HubModel, save_tensors
from fastssl.training import checkpoint
from fastssl.training.checkpoint_files import step_of
from fastssl.training.config import dump


def export(run: TrainedRun, formats: Sequence[str], out: Path) -> dict[str, Path]:
    """Write each format into a folder of its name below `out`; the folders.

    All are written under other names first: either all are there, and whole, or none.

    Raises:
        FileExistsError: there is one of that name.
        ValueError: an unknown format, or one that has no place for the model.
        ImportError: a format needs a package that is not installed.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        came = ", ".join(unknown) or "none"
        raise ValueError(f"format must be one or more of {', '.join(FORMATS)}, got {came}")
    folders = {name: out / name for name in dict.fromkeys(formats)}
    for folder in folders.values():
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it, or name another --out")
    writing = {name: folder.with_name(f"{name}.writing") for name, folder in folders.items()}
    try:
        for name, part in writing.items():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            usage = FORMATS[name](run, part)
            write_preprocessing(run, part)
            write_card(run, part, usage)
        for name, part in writing.items():
            os.rename(part, folders[name])
    finally:
        for part in writing.values():
            shutil.rmtree(part, ignore_errors=True)
    return folders


def write_safetensors(run: TrainedRun, folder: Path) -> Usage:
    """The encoder alone, with the config.json that builds it again."""
    model = backbone(run)
    if not isinstance(model, HubModel):
        return _plain_safetensors(run, folder)
    model.save_pretrained(folder)
    kind = next(c.__name__ for c in type(model).__mro__ if c.__module__.startswith("fastssl."))
    call, notes = "model", []
    if isinstance(model, MaskedAutoencoderHiera):
        call = "model.features"
        notes = ["The decoder is there as well; features take what comes before it."]
    code = f"""
from fastssl.models import {kind}

model = {kind}.from_pretrained("PATH_OF_THIS_FOLDER")
features = {call}(images)  # [B, D]
"""
    return Usage("fastssl", code, notes)


def _plain_safetensors(run: TrainedRun, folder: Path) -> Usage:
    """An encoder from elsewhere: its constructor is not ours to describe beyond its name."""
    save_tensors(folder / WEIGHTS, run.model.state_dict())
    model = run.config.model
    (folder / "config.json").write_text(
        json.dumps({"name": model.name, "args": dict(model.args)}, indent=2) + "\n",
        encoding="utf-8",
    )
    code = f"""
from fastssl.methods import build_encoder
from fastssl.models import load_pretrained

model = build_encoder({model.name!r}, {dict(model.args)!r}, image_size={run.image_size!r})
load_pretrained(model, "PATH_OF_THIS_FOLDER", strict=True)
features = model.eval()(images)  # [B, D]
"""
    return Usage("fastssl", code)


def write_checkpoint(run: TrainedRun, folder: Path) -> Usage:
    """The newest checkpoint as one file: all networks, heads and the optimizer's state."""
    saved = checkpoint.complete(run.folder / "checkpoints")
    if not saved:
        raise ValueError(f"format checkpoint needs a checkpoint, {run.folder} has none")
    file = folder / "checkpoint.pth"
    content = checkpoint.read_tensors(saved[-1])
    step = step_of(saved[-1])
    torch.save({**content, "step": step, "config": dump(run.config)}, file)
    code = """
import torch

checkpoint = torch.load("PATH_OF_THIS_FOLDER/checkpoint.pth", weights_only=True)
checkpoint["model"]      # every tensor of the method: networks, heads, centers, queues
checkpoint["optimizer"]  # its state, by the name of the parameter
checkpoint["config"]     # YAML of fastssl-train
"""
    note = "`model.weights=checkpoint.pth` of fastssl-train starts a run from its encoder."
    return Usage("fastssl", code, [note])


FORMATS: dict[str, Callable[[TrainedRun, Path], Usage]] = {
    "safetensors": write_safetensors,
    "checkpoint": write_checkpoint,
    "transformers": write_transformers,
    "onnx": write_onnx,
}
