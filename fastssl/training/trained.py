"""A finished run, or one that was interrupted, as the method that it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastssl.methods import Method
from fastssl.models import load_pretrained
from fastssl.training import checkpoint, setup
from fastssl.training.config import Config, load


def load_trained(folder: Path, image_size: int | None = None) -> tuple[Config, Method]:
    """A run's configuration and its method, of which `method.model` alone has what was trained.

    `image_size`: the encoder is built for images of that side, its positions resampled.

    Raises:
        FileNotFoundError: the folder is no run, or nothing of it was saved.
        ValueError: config.yaml does not describe a method, or the weights do not fit it.
    """
    weights, saved = folder / "weights.pth", checkpoint.complete(folder / "checkpoints")
    for name in ("config.yaml", "weights.pth"):
        if not (folder / name).is_file() and not (name == "weights.pth" and saved):
            raise FileNotFoundError(
                f"RUN must be the folder of a run, with config.yaml and weights.pth or a "
                f"checkpoint; {folder} has no {name}"
            )
    config = load(str(folder / "config.yaml"))
    if image_size is not None:
        config.views.image_size = image_size
    try:
        method = setup.method_of(config, num_samples=_num_samples(config.method.args))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.yaml'} must describe a method: {error}") from error
    if weights.is_file():
        load_pretrained(method.model, weights, strict=True)
    else:
        _load_checkpoint(method, saved[-1])
    return config, method


def _load_checkpoint(method: Method, path: Path) -> None:
    """Fill `method.model` alone: banks and optimizers of the run may be of another size."""
    (prefix,) = [name for name, module in method.named_modules() if module is method.model]
    tensors = {f"{prefix}.{key}": value for key, value in method.model.state_dict().items()}
    try:
        checkpoint.load_tensors(path, {"model": tensors})
    except ValueError as error:
        raise ValueError(f"the model does not fit the checkpoint {path}: {error}") from error


def _num_samples(args: dict[str, Any]) -> int:
    """Enough to build a method of which the encoder alone is loaded: those of the run may be so
    many that their banks take gigabytes."""
    prototypes = args.get("n_prototypes")
    return max(1 << 16, prototypes if isinstance(prototypes, int) else 0)
