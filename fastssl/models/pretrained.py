"""Load released weights: the checkpoint layouts of mae, hiera, dino, dinov2 and transformers."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from pathlib import Path

from torch import Tensor, nn

from fastssl.models.checkpoint_files import read_tensors, some
from fastssl.nn import interpolate_pos_embed

logger = logging.getLogger("fastssl")

Grid = tuple[int, ...]

# Wrappers around the encoder: DDP, torch.compile, the methods of fastssl (of two networks the
# teacher), dino's MultiCropWrapper and dinov2's dict.
WRAPPERS = ("module.", "_orig_mod.", "teacher.", "student.", "model.", "backbone.", "encoder.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did, as lists of state-dict keys.

    `missing` are the model's keys that the file lacks (they keep what they were initialised with),
    `unexpected` the file's that the model lacks, `mismatched` those of another shape (skipped),
    `resampled` the position embeddings (loaded) that were brought to the model's grid. `unused` are
    the tensors of `unexpected`: a projection head, for instance.
    """

    path: Path
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    resampled: list[str]
    unused: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"loaded {len(self.loaded)} tensors from {self.path}"]
        if self.resampled:
            parts.append(f"resampled to the model's grid: {some(self.resampled)}")
        return "; ".join([*parts, *self.differences()])

    def differences(self) -> list[str]:
        """Where file and model are not the same, in words."""
        kinds = {
            "not in the file, as initialised": self.missing,
            "of another shape, as initialised": self.mismatched,
            "in the file, not used": self.unexpected,
        }
        return [f"{words}: {_groups(keys)}" for words, keys in kinds.items() if keys]


def load_pretrained(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    strict: bool = False,
    checkpoint_key: str | None = None,
    old_grid: Grid | Mapping[str, Grid] | None = None,
    ignore_mismatched_sizes: bool = False,
    quiet: bool = False,
) -> LoadReport:
    """Load the weights in `path` into `model` and report the keys that were missing or unexpected.

    Takes what mae (`{"model"}`), hiera (`{"model_state"}`), dino (bare, or `{"student",
    "teacher"}`) and dinov2 (bare, blocks in chunks or not, or `{"teacher"}`) release, a plain
    state dict, .safetensors, a run's folder, and a folder of `save_pretrained` or of transformers'
    ViT, ViTMAE, Dinov2 or Hiera. Files are read with `weights_only=True`: no code in them runs.

    Args:
        strict: raise where a key is missing or unexpected, instead of reporting it.
        checkpoint_key: the entry that holds the weights, "student" for instance. By default the
            first of "model", "model_state", "teacher", "student", "state_dict".
        old_grid: (rows, columns), or (frames, rows, columns), of the file's position embedding, or
            a dict of them by key. Without it an embedding is taken as the model's where the
            number of tokens agrees, else as square, with the model's frames. Another grid than
            the model's is resampled.
        ignore_mismatched_sizes: skip and report tensors of another shape, instead of raising.
        quiet: leave it to the caller to say what was loaded, instead of logging it.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for a file that is no checkpoint,
    of which nothing fits, or that the arguments above refuse. The model is then unchanged.
    """
    path = Path(path).expanduser()
    target = model.state_dict()
    path, tensors = read_tensors(path, checkpoint_key)
    state, unused = _fit_keys(tensors, target)
    unexpected = [*unused]
    resampled = _resample_pos_embeds(model, state, target, old_grid)
    mismatched = [key for key in state if state[key].shape != target[key].shape]
    if mismatched and not ignore_mismatched_sizes:
        shapes = [f"{k} {list(state[k].shape)} for {list(target[k].shape)}" for k in mismatched]
        raise ValueError(
            f"{path} does not fit {type(model).__name__}, {len(shapes)} tensors have another shape"
            f" than the model's: {some(shapes)}. Build the model to match, or skip them with"
            " ignore_mismatched_sizes=True"
        )
    state = {key: tensor for key, tensor in state.items() if key not in mismatched}
    if not state:
        raise ValueError(
            f"nothing in {path} fits {type(model).__name__}: the file has {some(unexpected)};"
            f" the model has {some(target)}"
        )
    missing = [key for key in target if key not in state and key not in mismatched]
    report = LoadReport(path, list(state), missing, unexpected, mismatched, resampled, unused)
    if strict and not report.complete:
        difference = "; ".join(report.differences())
        raise ValueError(f"{path} is not exactly {type(model).__name__}: {difference}")
    model.load_state_dict(state, strict=False)
    if not quiet:
        logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
    return report


def _groups(keys: Iterable[str]) -> str:
    """Keys by the part before the first dot, counted."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.partition(".")[0], []).append(key)
    return some(f"{g} ({len(k)})" if len(k) > 1 else k[0] for g, k in groups.items())


def _fit_keys(
    state: dict[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors under the model's keys, and all others: wrappers stripped, chunks merged."""
    others: dict[str, Tensor] = {}
    wrapped = True
    while wrapped:
        wrapped = False
        for prefix in WRAPPERS:
            inside = {key for key in state if key.startswith(prefix)}
            if inside and not any(key.startswith(prefix) for key in target):
                # What lies beside the wrapper is another module's, a projection head for instance.
                others |= {key: state[key] for key in state if key not in inside}
                state = {key.removeprefix(prefix): state[key] for key in state if key in inside}
                wrapped = True
    # dinov2 trained with block_chunks > 0: blocks.<chunk>.<block>., the block counted throughout.
    state = {
        k if k in target else re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v
        for k, v in state.items()
    }
    others |= {key: tensor for key, tensor in state.items() if key not in target}
    return {key: tensor for key, tensor in state.items() if key in target}, others


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
