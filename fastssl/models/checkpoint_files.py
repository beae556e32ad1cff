"""The tensors of a checkpoint file or folder, whoever wrote it, without running what is in it."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.models.transformers_keys import is_transformers, official

# Where the official files keep the weights, the first found wins: mae, hiera, dino and dinov2 (the
# teacher is what they evaluate), I-JEPA (the same), and the plain trainers' name.
CONTAINERS = ("model", "model_state", "teacher", "student", "target_encoder", "state_dict")
# The weights in a folder, the first found wins: of save_pretrained, of a run, of an export as a
# checkpoint, of transformers.
IN_FOLDERS = ("model.safetensors", "weights.pth", "checkpoint.pth", "pytorch_model.bin")

_scalar = np.float64(0).__reduce__()[0]
# Official files hold the parsed command line beside the weights, and losses as NumPy's scalars.
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read_tensors(path: Path, checkpoint_key: str | None = None) -> tuple[Path, dict[str, Tensor]]:
    """The file, where `path` is a folder the one in it, and its state dict; that of transformers
    under the official keys.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a file that is no checkpoint.
    """
    path = _find(path)
    state = _unwrap(_read(path), checkpoint_key, path)
    return path, official(state) if is_transformers(state) else state


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first of them, and how many there are besides."""
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _find(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
        if found is None:
            raise IsADirectoryError(
                f"path must be a checkpoint file, or a folder with {' or '.join(IN_FOLDERS)}; "
                f"{path} is a directory without"
            )
        return found
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, {path} does not exist")
    return path


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged file makes torch's reader raise nearly anything.
    except Exception as error:
        more = _unsafe(path)
        reason: object = error
        if more:
            reason = f"it holds {some(more)}, whose loading may run code"
        elif isinstance(error, pickle.UnpicklingError | EOFError):
            # torch's text for it is about other versions of torch.
            reason = "it is damaged, or torch has not written it"
        raise ValueError(
            f"{path} is not a checkpoint that torch.load(weights_only=True) reads: {reason}"
        ) from error


def _unsafe(path: Path) -> list[str]:
    """What the file needs beyond tensors, where that can be told."""
    with suppress(Exception), torch.serialization.safe_globals(_HARMLESS):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return []


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _unwrap(checkpoint: Any, checkpoint_key: str | None, path: Path) -> dict[str, Tensor]:
    """The innermost state dict of a checkpoint."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(checkpoint).__name__}")
    if checkpoint_key is not None:
        if not isinstance(checkpoint.get(checkpoint_key), Mapping):
            raise ValueError(
                f"checkpoint_key must name a dict of {path}, which has {some(checkpoint)};"
                f" got {checkpoint_key!r}"
            )
        checkpoint = checkpoint[checkpoint_key]
    while True:
        inner = next((k for k in CONTAINERS if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is None:
            return {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
        checkpoint = checkpoint[inner]
