"""What a run tells people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from torch import nn

from fastssl.distributed import World
from fastssl.training.config import Config
from fastssl.training.setup import accumulation, micro_batch_size, scheduled, uses_bf16

_SCORES = {"knn": "k-NN", "linear": "linear probe"}


def introduction(config: Config, world: World, method: nn.Module, data: str, step: int) -> str:
    """What is about to run."""
    train = config.train
    micro_batch = micro_batch_size(config, world)
    millions = sum(p.numel() for p in method.parameters()) / 1e6
    start = f"going on after step {step}" if step else "starting"
    lr = config.schedules.lr
    warm_up = lr.hold_steps + lr.warmup_steps
    warm = min(warm_up, max(train.steps - 1, 0))
    warning = []
    if warm_up >= train.steps > 0:
        warning.append(
            f"warning: the warm-up of the learning rate takes {warm_up} steps "
            f"(schedules.lr.hold_steps + warmup_steps), the whole run {train.steps}"
        )
    return "\n".join(
        [
            f"{config.method.name} with {config.model.name}, {millions:.2f} M parameters",
            data,
            f"global batch {train.global_batch_size} = {world.size} ranks x "
            f"{accumulation(config, world)} micro-batches x {micro_batch} images a device, "
            f"{'bf16' if uses_bf16(config, world.device) else 'fp32'} on {world.device.type}",
            f"{start}, {train.steps} steps in all; learning rate after the warm-up "
            f"{scheduled(config, warm)['lr']:.2e}",
            *warning,
        ]
    )


def scores(step: int, values: dict[str, float]) -> str:
    """One evaluation in a line."""
    parts = [f"{name} {values[key]:.1f} %" for key, name in _SCORES.items()]
    few = {key.removeprefix("low_shot_"): v for key, v in values.items() if "low_shot_" in key}
    parts += [f"with {number} labels a class {value:.1f} %" for number, value in few.items()]
    return f"step {step}: frozen features, held-out images: {', '.join(parts)}"


def non_finite(
    step: int, in_a_row: int, came: Mapping[str, float], folder: Path, saved_step: int
) -> str:
    """What to do about a loss that is not finite any more."""
    # Finite parameters can be useless all the same.
    good = f"step {saved_step} is saved and finite" if saved_step else "nothing was saved yet"
    values = ", ".join(f"{name} {value:g}" for name, value in came.items())
    return (
        f"not finite at step {step}: {values}. The {in_a_row} last steps were skipped; "
        f"{good}. Try a smaller schedules.lr.base, a longer schedules.lr.warmup_steps, "
        f"optim.clip_grad=1 or train.precision=fp32; with --resume the run {folder} goes on from "
        "its last checkpoint, with --resume=FOLDER from an older one"
    )


def not_saved(step: int, saved_step: int, error: str) -> str:
    """A save failed while the run can go on."""
    good = f"step {saved_step} is saved and good" if saved_step else "nothing was saved yet"
    return (
        f"warning: step {step} could not be saved: {error}; {good}, and the run goes on until the "
        "next checkpoint is due"
    )


def not_written(name: str, step: int, error: OSError) -> str:
    """A page or a picture is not there, or is an older one."""
    return f"warning: {name} of step {step} could not be written: {error}"


def not_saved_at_all(step: int, saved_step: int, error: str) -> str:
    """The last save failed."""
    good = f"--resume goes on after step {saved_step}" if saved_step else "nothing is saved"
    return f"the last step, {step}, could not be saved: {error}; {good}"


def summary(
    config: Config,
    folder: Path,
    step: int,
    train_lines: list[dict],
    eval_lines: list[dict],
    skipped: dict[str, str],
) -> str:
    """The evidence at the end, or how to go on when it is not the end."""
    lines = [""]
    if eval_lines:
        before, after = eval_lines[0], eval_lines[-1]
        lines.append(
            f"{'frozen features':<16}{'step ' + str(before['step']):>10}"
            f"{'step ' + str(after['step']):>12}{'change':>10}"
        )
        for key, name in _SCORES.items():
            change = after[key] - before[key]
            lines.append(f"{name:<16}{before[key]:>8.1f} %{after[key]:>10.1f} %{change:>+10.1f}")
    counts = [line["skipped_steps"] for line in train_lines if "skipped_steps" in line]
    if counts:
        lines.append(f"{counts[-1]} steps were skipped: their gradient was not finite")
    train_lines = [line for line in train_lines if "loss" in line]
    if train_lines:
        speed = median(line["images_per_second"] for line in train_lines)
        wait = median(line["data_wait"] for line in train_lines)
        lines.append(
            f"loss {train_lines[0]['loss']:.4f} -> {train_lines[-1]['loss']:.4f}, "
            f"{speed:.0f} images/s, {wait:.0%} of the time waiting for data"
        )
    if skipped:
        lines.append(f"{len(skipped)} broken files were skipped, see {folder / 'skipped.json'}")
    if step < config.train.steps:
        lines.append(
            f"stopped after step {step} of {config.train.steps}; go on with: "
            f"fastssl-train {folder / 'config.yaml'} --resume"
        )
    lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)
