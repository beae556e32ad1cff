"""Load released weights: the checkpoint layouts of mae, hiera, dino and dinov2."""

import argparse
import logging
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.nn import interpolate_pos_embed

logger = logging.getLogger("fastssl")

Grid = tuple[int, ...]

# Where the official files keep the weights, the first found wins: mae, hiera, dino and dinov2 (the
# teacher is what they evaluate), and the plain trainers' name.
CONTAINERS = ("model", "model_state", "teacher", "student", "state_dict")
# Wrappers around the encoder: DDP, torch.compile, dino's MultiCropWrapper and dinov2's dict.
WRAPPERS = ("module.", "_orig_mod.", "backbone.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did, as lists of state-dict keys.

    `missing` are the model's keys that the file lacks, `unexpected` the file's that the model
    lacks, `mismatched` those of another shape (skipped), `resampled` the position embeddings
    (loaded) that were brought to the model's grid.
    """

    path: Path
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    resampled: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.path}"]
        for name in ("missing", "unexpected", "mismatched", "resampled"):
            if keys := getattr(self, name):
                parts.append(f"{len(keys)} {name} ({_some(keys)})")
        return "; ".join(parts)


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    strict: bool = False,
    checkpoint_key: str | None = None,
    old_grid: Grid | Mapping[str, Grid] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Load the weights in `path` into `model` and report the keys that were missing or unexpected.

    Takes what mae (`{"model"}`), hiera (`{"model_state"}`), dino (bare, or `{"student",
    "teacher"}`) and dinov2 (bare, blocks in chunks or not, or `{"teacher"}`) release, a plain
    state dict and .safetensors. Files are read with `weights_only=True`: no code in them runs.

    Args:
        strict: raise where a key is missing or unexpected, instead of reporting it.
        checkpoint_key: the entry that holds the weights, "student" for instance. By default the
            first of "model", "model_state", "teacher", "student", "state_dict".
        old_grid: (rows, columns), or (frames, rows, columns), of the file's position embedding, or
            a dict of them by key. Without it an embedding is taken as the model's where the
            number of tokens agrees, else as square, with the model's frames. Another grid than
            the model's is resampled.
        ignore_mismatched_sizes: skip and report tensors of another shape, instead of raising.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a file that is no checkpoint,
    of which nothing fits, or that the arguments above refuse. The model is then unchanged.
    """
    path = Path(path)
    target = model.state_dict()
    state, unexpected = _fit_keys(_unwrap(_read(path), checkpoint_key, path), target)
    resampled = _resample_pos_embeds(model, state, target, old_grid)
    mismatched = [key for key in state if state[key].shape != target[key].shape]
    if mismatched and not ignore_mismatched_sizes:
        shapes = [f"{k} {list(state[k].shape)} for {list(target[k].shape)}" for k in mismatched]
        raise ValueError(
            f"{path} does not fit {type(model).__name__}, {len(shapes)} tensors have another shape"
            f" than the model's: {_some(shapes)}. Build the model to match, or skip them with"
            " ignore_mismatched_sizes=True"
        )
    state = {key: tensor for key, tensor in state.items() if key not in mismatched}
    if not state:
        raise ValueError(
            f"nothing in {path} fits {type(model).__name__}: the file has {_some(unexpected)};"
            f" the model has {_some(target)}"
        )
    missing = [key for key in target if key not in state and key not in mismatched]
    report = LoadReport(path, list(state), missing, unexpected, mismatched, resampled)
    if strict and not report.complete:
        raise ValueError(f"{path} is not exactly {type(model).__name__}: {report}")
    model.load_state_dict(state, strict=False)
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read(path: Path) -> object:
    if path.is_dir():
        raise IsADirectoryError(f"path must be a checkpoint file, {path} is a directory")
    if not path.is_file():
        raise FileNotFoundError(f"path must be a checkpoint file, {path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # The official files hold the parsed command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a checkpoint that torch.load(weights_only=True) reads: {error}"
        ) from error


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


def _unwrap(checkpoint: object, checkpoint_key: str | None, path: Path) -> dict[str, Tensor]:
    """The innermost state dict of a checkpoint."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(checkpoint).__name__}")
    if checkpoint_key is not None:
        if not isinstance(checkpoint.get(checkpoint_key), Mapping):
            raise ValueError(
                f"checkpoint_key must name a dict of {path}, which has {_some(checkpoint)};"
                f" got {checkpoint_key!r}"
            )
        checkpoint = checkpoint[checkpoint_key]
    while True:
        inner = next((k for k in CONTAINERS if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is None:
            return {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
        checkpoint = checkpoint[inner]


def _fit_keys(
    state: dict[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors under the model's keys, the file's other keys): wrappers stripped, chunks merged."""
    unexpected: list[str] = []
    wrapped = True
    while wrapped:
        wrapped = False
        for prefix in WRAPPERS:
            inside = {key for key in state if key.startswith(prefix)}
            if inside and not any(key.startswith(prefix) for key in target):
                # What lies beside the wrapper is another module's, a projection head for instance.
                unexpected += [key for key in state if key not in inside]
                state = {key.removeprefix(prefix): state[key] for key in state if key in inside}
                wrapped = True
    # dinov2 trained with block_chunks > 0: blocks.<chunk>.<block>., the block counted throughout.
    state = {re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}
    unexpected += [key for key in state if key not in target]
    return {key: tensor for key, tensor in state.items() if key in target}, unexpected


def _resample_pos_embeds(
    model: nn.Module,
    state: dict[str, Tensor],
    target: Mapping[str, Tensor],
    old_grid: Grid | Mapping[str, Grid] | None,
) -> list[str]:
    """Bring the position embeddings in `state` to the model's grid; the keys that were changed."""
    grids = model.pos_embed_grids() if hasattr(model, "pos_embed_grids") else {}
    antialias = getattr(model, "interpolate_antialias", False)
    resampled = []
    for key, (grid, num_prefix) in grids.items():
        if key not in state or state[key].shape[-1] != target[key].shape[-1]:
            continue
        named = old_grid.get(key) if isinstance(old_grid, Mapping) else old_grid
        num_tokens = state[key].shape[1] - num_prefix
        source = _source_grid(num_tokens, tuple(grid), named)
        if prod(source) != num_tokens or len(source) != len(grid):
            raise ValueError(
                f"old_grid must be {len(grid)} sides of the {num_tokens} tokens in {key} of the"
                f" file, got {named}"
            )
        if source != tuple(grid):
            state[key] = interpolate_pos_embed(
                state[key], source, grid, num_prefix, antialias=antialias
            )
            resampled.append(key)
    return resampled


def _source_grid(num_tokens: int, grid: Grid, named: Grid | None) -> Grid:
    """The file's grid: along time alone as many as there are, else as named, or guessed."""
    if len(grid) == 1:
        return (num_tokens,)
    if named is not None or prod(grid) == num_tokens:
        return tuple(named or grid)
    frames = grid[:-2]
    side = isqrt(num_tokens // prod(frames))
    return (*frames, side, side)
