"""The configuration: one nested dataclass per component, every key with its help.

`load("mae_vit_base", ["train.steps=1000"])` reads a recipe and puts overrides on top.
"""

# ruff: noqa: RUF009 - `option` is dataclasses.field with a help text
from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastssl.methods import METHODS, method_class
from fastssl.names import nearest
from fastssl.optim.clip import CLIPPED
from fastssl.optim.schedules import SCALINGS, Schedule
from fastssl.training import recipes

DEFAULT_RECIPE = "photos"


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help; mutable defaults are copied."""
    metadata["help"] = text
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoaderConfig:
    num_workers: int = option(0, "processes that decode images, per rank; 0: the main process")
    prefetch: int = option(2, "micro-batches that each of these processes has ready")
    views_on_device: bool | None = option(
        None, "make views where the run trains rather than in the processes; null: on a GPU"
    )
    shard_window: int = option(
        0,
        "shards that an epoch reads from at a time, so that a cache need not hold all; 0: all",
    )


@dataclass
class ViewsConfig:
    image_size: Any = option(224, "side of a crop in pixels, or [height, width]", type="int | list")
    scale: list[float] | None = option(
        None, "area of a crop / area it is taken from, [min, max]; null: the method's, or [0.2, 1]"
    )
    ratio: list[float] | None = option(
        None, "width / height of a crop, [min, max]; null: the method's, or [3/4, 4/3]"
    )
    flip: float | None = option(
        None, "probability of a horizontal flip; null: the method's, or 0.5"
    )
    groups: Any = option(
        None,
        "kinds of views, each of number, size, scale, ratio, flip, jitter, brightness, contrast, "
        "saturation, hue, grey, blur, sigma, solarize; null: the method's",
        type="list of groups | null",
    )
    region: list[float] | None = option(
        None,
        "a sample is a fixed part of its picture, of this share of the area, [min, max]; null: "
        "the whole picture",
    )
    crops_per_image: int | None = option(
        None, "samples of one picture in an epoch; null: 64 of a photograph, 1 of a file"
    )
    repeats: int = option(
        1,
        "crops of one picture in the same global batch; an epoch has so many times more samples",
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "subtracted from R, G, B (white is 1)")
    std: list[float] = option([0.229, 0.224, 0.225], "R, G, B are divided by it")


@dataclass
class ModelConfig:
    name: str = option(
        "mae_vit_base_patch16",
        "factory or class in fastssl.models; timm:name; file.py:factory or package.module:factory",
    )
    args: dict[str, Any] = option({}, "its keyword arguments, as model.args.depth=4")
    weights: str | None = option(
        None,
        "weights to start from: a file of mae, hiera, dino or dinov2, a run's folder, one of "
        "fastssl-export or of transformers; what it lacks is initialised, and said",
    )


@dataclass
class MethodConfig:
    name: str = option(
        "mae", f"what is learned: {', '.join(METHODS)}; file.py:Class or package.module:Class"
    )
    args: dict[str, Any] = option({}, "its keyword arguments, as method.args.mask_ratio=0.6")


@dataclass
class OptimConfig:
    name: str = option(
        "adamw",
        "adamw; sgd with momentum; lars and lamb adapt the rate of every matrix to its norm",
        choices=("adamw", "sgd", "lars", "lamb"),
    )
    betas: list[float] = option([0.9, 0.95], "decay rates of AdamW's and LAMB's two moments")
    eps: float = option(1e-8, "AdamW's and LAMB's term in the denominator")
    momentum: float = option(0.9, "SGD's and LARS's share of the last step in the next")
    trust_coefficient: float = option(
        0.001, "LARS's step of a matrix / its norm, at a learning rate of 1"
    )
    lr_scaling: str = option(
        "linear", "how the learning rate grows with the global batch", choices=SCALINGS
    )
    lr_reference_batch: int = option(256, "global batch that schedules.lr.base is meant for")
    layer_decay: float = option(1.0, "factor of the learning rate from one block to the one below")
    fixed_lr: list[str] = option([], "modules of the method whose learning rate stays at its base")
    clip_grad: float | None = option(None, "largest norm of the gradient; null: no clipping")
    clip_grad_by: str = option(
        "whole", "whose norm that is: the whole gradient's, or each parameter's", choices=CLIPPED
    )


@dataclass
class SchedulesConfig:
    """Only base of the learning rate is scaled with the batch; its start and final are not."""

    lr: Schedule = option(Schedule(1.5e-4, 0.0, 0.0), "learning rate, base per lr_reference_batch")
    weight_decay: Schedule = option(Schedule(0.05, 0.05), "weight decay")
    last_layer_lr: Schedule | None = option(
        None, "factor of the learning rate of modules called last_layer (hold_steps freezes)"
    )
    teacher_momentum: Schedule | None = option(
        None, "share of the teacher that a step keeps; null: the method's"
    )
    teacher_temp: Schedule | None = option(
        None, "temperature of the teacher's softmax; null: the method's"
    )


@dataclass
class TrainConfig:
    steps: int = option(1000, "optimizer steps of the whole run")
    global_batch_size: int = option(256, "images of one optimizer step, over all ranks")
    device_batch_size: int | None = option(
        None, "images of one forward on one device; null: as accumulation says"
    )
    accumulation: int = option(
        1, "micro-batches of one optimizer step, per rank; where device_batch_size is null"
    )
    precision: str = option(
        "fp32",
        "bf16: autocast, parameters in fp32; auto: bf16 on what multiplies in it: CUDA and "
        "CPUs with AMX or AVX-512 BF16",
        choices=("fp32", "bf16", "auto"),
    )
    shard_ranks: int = option(
        0,
        "ranks that share one copy of parameters and optimizer state (FSDP2); 0: all, 1: each has "
        "its own, as many as a node has: hybrid",
    )
    param_dtype: str = option(
        "auto",
        "in which sharded parameters are gathered and computed with; the shards are fp32 and "
        "gradients are reduced in fp32; auto: bf16 on a GPU where precision is",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "torch.compile the method, with several ranks block by block")
    grad_checkpointing: bool = option(
        False, "keep each block's input only and compute the rest again in backward"
    )
    batch_norm_ranks: int = option(
        0, "ranks that share the statistics of batch normalisation; 0: all, 1: each has its own"
    )
    max_bad_steps: int = option(
        10, "a step whose gradient is not finite is skipped; so many in a row end the run"
    )
    device: str = option("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))


@dataclass
class EvalConfig:
    data: str | None = option(
        None,
        "labelled images to judge by: a folder of class folders, or digits; null: the pictures of "
        "data, of which the right halves are held out",
    )
    every: int = option(0, "steps between evaluations; 0: only before and after")
    batch_size: int = option(256, "images of one forward, on all ranks together")
    scale: list[float] = option([0.2, 0.5], "as views.scale, for the crops of the evaluation")
    crops: int = option(32, "crops of each half of an evaluated picture")
    max_images: int = option(200, "pictures in the evaluation; 0: none")
    labels_per_class: list[int] = option(
        [], "also judge by probes that learn from so few labels of each class, as [1, 5]"
    )
    pictures: int = option(8, "rows of reconstructions.png")


@dataclass
class CheckpointConfig:
    every: int = option(1000, "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "newest checkpoints that are kept")
    asynchronous: bool = option(
        False,
        "write beside the training, from a copy of all tensors in host memory that stays there",
    )


@dataclass
class LogConfig:
    every: int = option(10, "steps between lines in metrics.jsonl and on the progress bar")
    tensorboard: bool = option(True, "write TensorBoard files too")
    csv: bool = option(False, "write metrics_train.csv and metrics_eval.csv too")
    wandb: bool = option(
        False,
        "send to Weights & Biases too, as WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE say",
    )
    report_every: float = option(
        30.0,
        "least seconds between refreshes of report.html while the run goes on, which take at most "
        "1 % of the time; 0: only at the end",
    )
    peak_tflops: float | None = option(
        None,
        "TFLOP/s of one device, which MFU is a share of; null: the data sheet's, of a GPU that is "
        "known, and no MFU on others",
    )
    flops_per_image: float | None = option(
        None,
        "operations of forward and backward for one image; null: counted in the first step, except "
        "under train.compile",
    )


@dataclass
class Config:
    name: str = option("", "the run is in <out>/<name>; empty: the recipe's name")
    data: str = option(
        "photos",
        "'photos', 'digits', a folder of images at any depth, tar shards (a folder of them, or "
        "paths or URLs with {000..099}), or a dataset of the library datasets as hf:NAME, "
        "hf:NAME/SPLIT or hf:/folder",
    )
    out: str = option("runs", "folder of all runs")
    overwrite: bool = option(False, "delete a finished or broken run of the same name first")
    seed: int = option(0, "of weights, crops, order and masks")
    loader: LoaderConfig = option(LoaderConfig(), "reading of images")
    views: ViewsConfig = option(ViewsConfig(), "crops")
    model: ModelConfig = option(ModelConfig(), "network")
    method: MethodConfig = option(MethodConfig(), "objective")
    optim: OptimConfig = option(OptimConfig(), "optimizer")
    schedules: SchedulesConfig = option(SchedulesConfig(), "quantities by step")
    train: TrainConfig = option(TrainConfig(), "the loop")
    eval: EvalConfig = option(EvalConfig(), "evaluation on frozen features")
    checkpoint: CheckpointConfig = option(CheckpointConfig(), "checkpoints")
    log: LogConfig = option(LogConfig(), "metrics")


@dataclass(frozen=True)
class Key:
    """One key of the configuration: a value, or a group of keys."""

    name: str  # with dots
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]
    group: type | None
    optional: bool


def keys(defaults: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration (or a part of one), groups before what they hold."""
    hints = typing.get_type_hints(type(defaults))
    for f in dataclasses.fields(defaults):
        hint, optional = hints[f.name], False
        if isinstance(hint, types.UnionType):
            hint, optional = hint.__args__[0], True
        group = hint if dataclasses.is_dataclass(hint) else None
        default = getattr(defaults, f.name)
        name = f.metadata.get("type") or (
            hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
        )
        yield Key(
            name=prefix + f.name,
            type=name + (" | null" if optional else ""),
            default=default,
            help=f.metadata["help"],
            choices=f.metadata.get("choices", ()),
            group=group,
            optional=optional,
        )
        if group is not None:
            yield from keys(default or group(), f"{prefix}{f.name}.")


_KEYS = {key.name: key for key in keys(Config())}


def load(recipe: str = DEFAULT_RECIPE, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe or YAML file with `key.sub=value` overrides.

    Raises:
        ValueError: unknown recipe, unknown key (names the nearest), wrong type (names the key, the
            expected type and what came), or a value out of range.
    """
    path = recipes.find(recipe)
    config = OmegaConf.structured(Config)
    config.name = path.stem
    try:
        content = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}")
    updates = [(OmegaConf.to_container(content), False)]
    if path.name == "config.yaml" and content.get("name") == path.absolute().parent.name:
        # The file of a run means that run, wherever it is named from.
        updates.append(({"out": str(path.absolute().parent.parent)}, False))
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name:
            raise ValueError(f"an override must look like key.sub=value, got {override!r}")
        try:
            values = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except Exception as error:
            raise ValueError(f"{override!r} has a value that YAML cannot read: {error}") from error
        # `model.args={a: 1}` are all of the arguments, `model.args.a=1` is one more.
        updates.append((values, name not in _KEYS))
    own = _own_schedules([values for values, _ in updates])
    for values, merge in updates:
        _update(config, values, own, merge=merge)
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error.msg}") from error
    check(result)
    return result


def _own_schedules(updates: Sequence[dict]) -> dict[str, Schedule]:
    """The schedules of the method that is named last: what a key of one of them changes."""
    name = MethodConfig().name
    for values in updates:
        if isinstance(values.get("method"), dict):
            name = values["method"].get("name", name)
    try:
        return {f"schedules.{key}": s for key, s in method_class(name).schedules.items()}
    except (ValueError, AttributeError, TypeError):
        return {}  # what is wrong with the name is said where the method is built


def _update(
    config: DictConfig,
    values: dict,
    own: dict[str, Schedule],
    prefix: str = "",
    merge: bool = False,
) -> None:
    for name, value in values.items():
        key = _KEYS.get(f"{prefix}{name}")
        if key is None:
            raise ValueError(
                f"unknown key {prefix}{name}; the nearest is {nearest(f'{prefix}{name}', [*_KEYS])}"
            )
        if key.group is None:
            _set(config, key, value, merge)
        elif isinstance(value, dict):
            if OmegaConf.select(config, key.name) is None:
                default = copy.deepcopy(own.get(key.name)) or key.group()
                OmegaConf.update(config, key.name, default)
            _update(config, value, own, f"{key.name}.", merge)
        elif value is None and key.optional:
            OmegaConf.update(config, key.name, None)
        else:
            inside = ", ".join(f.name for f in dataclasses.fields(key.group))
            raise ValueError(f"{key.name} must be a group of keys ({inside}), got {value!r}")


def _set(config: DictConfig, key: Key, value: Any, merge: bool) -> None:
    try:
        OmegaConf.update(config, key.name, value, merge=merge and isinstance(value, dict))
    except OmegaConfBaseException:
        raise ValueError(
            f"{key.name} must be {key.type}, got {value!r} ({type(value).__name__})"
        ) from None
    if key.choices and value not in key.choices:
        options = ", ".join(key.choices)
        raise ValueError(
            f"{key.name} must be one of {options}, got {value!r}; "
            f"the nearest is {nearest(str(value), key.choices)}"
        )


def check(config: Config) -> None:
    """ValueError for a value out of its range; what depends on data or model is checked there."""
    train, views = config.train, config.views
    sides = views.image_size if isinstance(views.image_size, list) else [views.image_size]
    if len(sides) > 2 or not sides or any(type(s) is not int or s < 1 for s in sides):
        raise ValueError(
            f"views.image_size must be a positive int or [height, width], got {views.image_size!r}"
        )
    for name, value in (
        ("train.steps", train.steps),
        ("loader.num_workers", config.loader.num_workers),
        ("loader.shard_window", config.loader.shard_window),
        ("eval.every", config.eval.every),
        ("train.batch_norm_ranks", train.batch_norm_ranks),
        ("train.shard_ranks", train.shard_ranks),
        ("eval.max_images", config.eval.max_images),
        ("checkpoint.every", config.checkpoint.every),
        ("log.report_every", config.log.report_every),
    ):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    at_least_one = {
        "train.global_batch_size": train.global_batch_size,
        "train.accumulation": train.accumulation,
        "train.device_batch_size": (
            1 if train.device_batch_size is None else train.device_batch_size
        ),
        "train.max_bad_steps": train.max_bad_steps,
        "log.every": config.log.every,
        "loader.prefetch": config.loader.prefetch,
        "views.repeats": views.repeats,
        "checkpoint.keep": config.checkpoint.keep,
        "eval.batch_size": config.eval.batch_size,
        "eval.pictures": config.eval.pictures,
        "eval.crops": config.eval.crops,
        "eval.labels_per_class": min(config.eval.labels_per_class, default=1),
        "optim.lr_reference_batch": config.optim.lr_reference_batch,
        "views.crops_per_image": 1 if views.crops_per_image is None else views.crops_per_image,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value, length in (
        ("views.scale", views.scale, 2),
        ("views.ratio", views.ratio, 2),
        ("views.region", views.region, 2),
        ("views.mean", views.mean, 3),
        ("views.std", views.std, 3),
        ("eval.scale", config.eval.scale, 2),
        ("optim.betas", config.optim.betas, 2),
    ):
        if value is not None and len(value) != length:
            raise ValueError(f"{name} must have {length} values, got {value}")
    for name, value in (
        ("views.scale", views.scale),
        ("views.ratio", views.ratio),
        ("views.region", views.region),
        ("eval.scale", config.eval.scale),
    ):
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"{name} must be [min, max] with 0 < min <= max, got {value}")
    if train.param_dtype == "bf16" and train.precision == "fp32":
        raise ValueError(
            "train.param_dtype=bf16 needs train.precision=bf16 or auto: only autocast brings "
            "inputs to the parameters' dtype"
        )
    if train.device_batch_size is not None and train.accumulation != 1:
        raise ValueError(
            "train.accumulation must be left out where train.device_batch_size is given, got "
            f"{train.accumulation} and {train.device_batch_size}"
        )
    if train.global_batch_size % views.repeats:
        raise ValueError(
            f"train.global_batch_size must be a multiple of views.repeats = {views.repeats}, got "
            f"{train.global_batch_size}"
        )
    groups = [] if views.groups is None else views.groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"views.groups must be a list of groups of keys, got {groups!r}")
    for name in ("peak_tflops", "flops_per_image"):
        value = getattr(config.log, name)
        if value is not None and not value > 0:
            raise ValueError(f"log.{name} must be positive, got {value}")
    if config.optim.clip_grad is not None and not config.optim.clip_grad > 0:
        raise ValueError(f"optim.clip_grad must be positive, got {config.optim.clip_grad}")
    for name in ("lr", "weight_decay"):
        schedule = getattr(config.schedules, name)
        for key in ("base", "start", "final"):
            value = getattr(schedule, key)
            if value is not None and not value >= 0:
                raise ValueError(f"schedules.{name}.{key} must not be negative, got {value}")
    if min(views.std) <= 0:
        raise ValueError(f"views.std must be positive, got {views.std}")
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ValueError(f"name must be the name of a folder, got {config.name!r}")


def dump(config: Config) -> str:
    """YAML that `load` reads back, without the wish to overwrite: that was for this once."""
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(config, overwrite=False)))


def describe() -> str:
    """Every key with its type, default and help, one a line, for --help."""
    lines = []
    for key in _KEYS.values():
        if key.group is not None:
            lines += ["", f"{key.name}: {key.help}" + (" (default: null)" * key.optional)]
            continue
        choices = f" ({', '.join(key.choices)})" if key.choices else ""
        default = "null" if key.default is None else key.default
        lines.append(f"  {key.name}={default!s}  [{key.type}] {key.help}{choices}")
    return "\n".join(lines)
