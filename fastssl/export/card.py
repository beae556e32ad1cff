"""The card of an exported model: what it is, how to load it, and how it came to be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from fastssl.export.run import TrainedRun
from fastssl.training.config import dump
from fastssl.version import __version__

_SCORES = {"knn": "k-NN, %", "linear": "linear probe, %"}


@dataclass(frozen=True)
class Usage:
    """library: as the Hugging Face Hub calls it; code: that loads the model and makes `features`;
    notes: sentences on what is there and what is not."""

    library: str
    code: str
    notes: list[str] = field(default_factory=list)


def write_card(run: TrainedRun, folder: Path, usage: Usage) -> None:
    """Write README.md. The license is left to whoever publishes the model."""
    (folder / "README.md").write_text(_card(run, usage), encoding="utf-8")


def write_preprocessing(run: TrainedRun, folder: Path) -> None:
    """Write preprocessor_config.json, which transformers reads: the images of the evaluation. The
    short side is resized for the longer side of an oblong, then the middle is cut out."""
    height, width = run.image_size
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": max(height, width) * 256 // 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(run.config.views.mean),
        "image_std": list(run.config.views.std),
    }
    text = json.dumps(config, indent=2)
    (folder / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")


def _card(run: TrainedRun, usage: Usage) -> str:
    config = run.config
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    height, width = run.image_size
    mean, std = (", ".join(f"{v:g}" for v in x) for x in (config.views.mean, config.views.std))
    parts = [
        "---",
        f"library_name: {usage.library}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- fastssl",
        "- self-supervised-learning",
        f"- {json.dumps(config.method.name)}",
        "---",
        "",
        f"# {config.name}",
        "",
        f"{config.model.name} with {millions:.2f} M parameters, pretrained without labels by "
        f"{config.method.name}.",
        "",
        "## Use",
        "",
        "```python",
        usage.code.strip(),
        "```",
        "",
        f"`images` are RGB of {height} x {width} pixels in [0, 1], less ({mean}), divided by "
        f"({std}).",
        *(f"\n{note}" for note in usage.notes),
        "",
        "## Data",
        "",
        run.versions.get("data") or f"`data={config.data}`",
        *_results(run),
        "",
        "## Training",
        "",
        *_training(run),
        "",
        "```yaml",
        dump(config).strip(),
        "```",
    ]
    return "\n".join(parts) + "\n"


def _results(run: TrainedRun) -> list[str]:
    """The last evaluation of the run."""
    numbers = {
        name: value
        for name, value in run.scores.items()
        if isinstance(value, float) and math.isfinite(value)
    }
    if not numbers:
        return []
    rows = [f"| {_SCORES.get(name, name)} | {value:.4g} |" for name, value in numbers.items()]
    data = run.config.eval.data or "the held-out parts of the same images"
    return [
        "",
        "## Results",
        "",
        f"Of frozen features after step {run.scores['step']}, on {data}:",
        "",
        "| measure | value |",
        "|---|---|",
        *rows,
    ]


def _training(run: TrainedRun) -> list[str]:
    train, versions = run.config.train, run.versions
    done = train.steps if run.step is None else run.step
    commit = versions.get("commit") or "not recorded"
    return [
        f"- {done} of {train.steps} steps of {train.global_batch_size} images, "
        f"seed {run.config.seed}",
        f"- fastssl {versions.get('fastssl', 'of an unrecorded version')}, commit {commit}, "
        f"torch {versions.get('torch', 'of an unrecorded version')}; exported by {__version__}",
    ]
