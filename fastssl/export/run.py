"""What a run's folder says of the model that it trained."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastssl.methods import Method
from fastssl.models import MaskedAutoencoderViT, VisionTransformer
from fastssl.training import checkpoint
from fastssl.training.checkpoint_files import step_of
from fastssl.training.config import Config
from fastssl.training.report import read_metrics
from fastssl.training.trained import load_trained


@dataclass(frozen=True)
class TrainedRun:
    """A run as `open_run` finds it.

    method: in evaluation mode; `method.model` has the trained weights.
    image_size: (height, width) of the images that the exported model is for.
    step: of the weights, None where nothing tells. scores: the last line of the evaluation until
        then, {} where there was none.
    versions: what the run was started with, {} where that was not recorded.
    """

    folder: Path
    config: Config
    method: Method
    image_size: tuple[int, int]
    scores: dict[str, float]
    step: int | None
    versions: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return self.method.model

    @property
    def averages_patches(self) -> bool:
        """Whether the features that the run was judged by are not what `model(images)` gives: all
        methods of which that is so take the mean of the patches."""
        return type(self.method).features is not Method.features


def open_run(folder: Path, image_size: int | None = None) -> TrainedRun:
    """A run's folder; `image_size` in place of its own, with the positions resampled. Errors as of
    `load_trained`."""
    config, method = load_trained(folder, image_size)
    size = config.views.image_size
    train, evals = read_metrics(folder / "metrics.jsonl")
    versions = folder / "versions.jsonl"
    lines = versions.read_text(encoding="utf-8").splitlines() if versions.is_file() else []
    step = max((line["step"] for line in (*train, *evals)), default=None)
    if not (folder / "weights.pth").is_file():
        # Of a run that was interrupted, the newest checkpoint is what was loaded.
        step = step_of(checkpoint.complete(folder / "checkpoints")[-1])
    evals = [line for line in evals if step is None or line["step"] <= step]
    return TrainedRun(
        folder=folder,
        config=config,
        method=method.eval(),
        image_size=tuple(size) if isinstance(size, list) else (size, size),
        scores=evals[-1] if evals else {},
        step=step,
        versions=json.loads(lines[-1]) if lines else {},
    )


def backbone(run: TrainedRun) -> nn.Module:
    """The encoder alone, whose call gives the run's features [B, D].

    That of a MaskedAutoencoderViT is a VisionTransformer with the mean of the patches. A
    MaskedAutoencoderHiera stays as it is: its features take its fusion heads, `model.features`.
    """
    model = run.model
    if isinstance(model, MaskedAutoencoderViT):
        return _encoder_of(model)
    if isinstance(model, VisionTransformer) and run.averages_patches:
        model = copy.deepcopy(model)
        model.global_pool = model._arguments["global_pool"] = "avg"
    return model


def _encoder_of(model: MaskedAutoencoderViT) -> VisionTransformer:
    shared = ("in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_layer")
    size = tuple(n * p for n, p in zip(model.grid_size, model.patch_size, strict=True))
    encoder = VisionTransformer(
        img_size=size,
        patch_size=model.patch_size,
        global_pool="avg",
        **{name: model.arguments[name] for name in shared},
    )
    state = model.state_dict()
    encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
    return encoder.eval()
