"""From the configuration to what the loop works with."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fastssl import distributed
from fastssl.data import Batch, build_datasets
from fastssl.data.crops import PretrainingCrops, Request
from fastssl.data.labelled import build_labelled
from fastssl.data.loader import CropsDataset, Loader, build_loader, num_samples, steps_per_epoch
from fastssl.data.views import View
from fastssl.distributed import World
from fastssl.methods import Method, build_method, make_views, method_class
from fastssl.models import LoadReport, load_pretrained
from fastssl.nn import SyncBatchNorm
from fastssl.optim import build_adamw, build_lamb, build_lars, build_sgd, scale_lr
from fastssl.training.config import Config
from fastssl.training.start import start_from

# What may be called from outside a sharded method, besides forward.
FORWARD_METHODS = ("features", "reconstruct")
# How often torch may compile the code of a block: once per kind of block that shares it, with and
# without gradients. Past torch's own 8 it would run the others uncompiled.
MAX_COMPILED_KINDS = 64
# Schedules that the loop itself applies.
_OF_THE_OPTIMIZER = ("lr", "weight_decay", "last_layer_lr")


def datasets(
    config: Config,
) -> tuple[PretrainingCrops, tuple[CropsDataset, CropsDataset] | None]:
    """The pretraining set, and the two of the evaluation if there is one."""
    views, judged = config.views, config.eval
    size = views.image_size
    size = tuple(size) if isinstance(size, list) else size
    train_set, halves = build_datasets(
        config.data,
        image_size=size,
        views=kinds_of_views(config),
        seed=config.seed,
        region=None if views.region is None else tuple(views.region),
        crops_per_image=views.crops_per_image,
        repeats=views.repeats,
        shard_window=config.loader.shard_window,
        mean=tuple(views.mean),
        std=tuple(views.std),
        eval_scale=tuple(judged.scale),
        eval_crops=judged.crops,
        max_eval_images=0 if judged.data else judged.max_images,
    )
    if judged.data is None:
        return train_set, halves
    labelled = build_labelled(
        judged.data, image_size=size, mean=views.mean, std=views.std, seed=config.seed
    )
    return train_set, labelled


def check_alike(
    train_set: PretrainingCrops, eval_sets: tuple[CropsDataset, CropsDataset] | None
) -> None:
    """ValueError on all ranks unless they found the same data: each looks for itself."""
    found = (len(train_set), *(len(one) for one in eval_sets or ()), sorted(train_set.held_out))
    of_ranks = distributed.gather(found)
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            raise ValueError(
                f"data must be the same on all ranks; {other[0]} samples and {len(other[-1])} "
                f"pictures to judge by on rank {rank}, {of_ranks[0][0]} and {len(of_ranks[0][-1])} "
                "on rank 0"
            )


def kinds_of_views(config: Config) -> tuple[View, ...]:
    """What the method asks for, with what the configuration changes of it."""
    views = config.views
    base = {name: getattr(views, name) for name in ("scale", "ratio", "flip")}
    return make_views(
        method_class(config.method.name),
        views.image_size,
        views.groups,
        {name: value for name, value in base.items() if value is not None},
    )


def loader(config: Config, train_set: PretrainingCrops, world: World, start_step: int) -> Loader:
    """This rank's micro-batches from optimizer step `start_step` on."""
    return build_loader(
        train_set,
        global_batch_size=config.train.global_batch_size,
        num_steps=config.train.steps,
        start_step=start_step,
        rank=world.rank,
        world_size=world.size,
        accumulation=accumulation(config, world),
        num_workers=config.loader.num_workers,
        prefetch=config.loader.prefetch,
        views_on_device=config.loader.views_on_device,
        device=world.device,
        seed=config.seed,
    )


def example_batch(
    config: Config,
    train_set: PretrainingCrops,
    eval_sets: tuple[CropsDataset, CropsDataset] | None,
    device: torch.device,
) -> Batch:
    """Crops to show reconstructed: held-out ones, evenly spaced, if there are any."""
    dataset = train_set if eval_sets is None else eval_sets[1]
    number = min(config.eval.pictures, len(dataset))
    request = Request(torch.arange(number) * len(dataset) // number)
    return next(iter(Loader(dataset, [request], device=device)))


def uses_bf16(config: Config, device: torch.device) -> bool:
    """Whether the run computes under bf16 autocast; without hardware for it that is slow."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def gathers_bf16(config: Config, device: torch.device) -> bool:
    """Whether sharded parameters are gathered in bf16 and computed with as such."""
    if config.train.param_dtype == "auto":
        return device.type != "cpu" and uses_bf16(config, device)
    if config.train.param_dtype == "bf16" and not uses_bf16(config, device):
        raise ValueError(
            "train.param_dtype=bf16 needs train.precision=bf16: auto is fp32 on this "
            f"{device.type}, which does not multiply in bf16"
        )
    return config.train.param_dtype == "bf16"


def accumulation(config: Config, world: World) -> int:
    """Micro-batches of one optimizer step, per rank: all ranks' make up the global batch."""
    train = config.train
    if train.device_batch_size is None:
        parts = train.accumulation
        rule = f"train.accumulation = {world.size} x {parts}"
    else:
        parts, rest = divmod(train.global_batch_size, world.size * train.device_batch_size)
        rule = f"train.device_batch_size = {world.size} x {train.device_batch_size}"
        parts = 0 if rest else parts
    if not parts or train.global_batch_size % (world.size * parts):
        raise ValueError(
            f"train.global_batch_size must be a multiple of ranks x {rule}, "
            f"got {train.global_batch_size}"
        )
    return parts


def micro_batch_size(config: Config, world: World) -> int:
    """Images of one forward on one device."""
    return config.train.global_batch_size // (world.size * accumulation(config, world))


def position(config: Config, train_set: PretrainingCrops) -> dict[str, int | None]:
    """What the place of a step in the data depends on; it must not change when a run resumes."""
    repeats, window = config.views.repeats, config.loader.shard_window
    return {
        "seed": config.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "the number of samples in data": len(train_set),
        # None by default, as what is missing in checkpoints from before there were such keys.
        "views.repeats": repeats if repeats > 1 else None,
        "loader.shard_window": window or None,
    }


def method_of(config: Config, **options: Any) -> Method:
    """What the configuration describes, as it is before training; `options` as in build_method."""
    return build_method(
        config.method.name,
        model=config.model.name,
        model_args=config.model.args,
        args=config.method.args,
        image_size=config.views.image_size,
        views=kinds_of_views(config),
        seed=config.seed,
        **options,
    )


def method_and_optimizer(
    config: Config, world: World, train_set: PretrainingCrops
) -> tuple[Method, Optimizer]:
    """Weights by config.seed, the same on all ranks, then compiled and sharded as configured.

    Of several ranks the first alone ever holds the whole model, on the CPU.
    """

    def build() -> Method:
        return _whole_method(config, world, train_set)

    if world.size == 1:
        method = build().to(world.device)
    else:
        method, tensors = distributed.build_once(build, world)
        method = SyncBatchNorm.convert_sync_batchnorm(
            method, distributed.subgroup(config.train.batch_norm_ranks)
        )
    if config.train.compile:
        # FSDP's hooks stand between the blocks: there, each is compiled by itself.
        compile_each([method] if world.size == 1 else distributed.blocks(method))
    if world.size > 1:
        distributed.shard(
            method,
            world,
            FORWARD_METHODS,
            shard_ranks=config.train.shard_ranks,
            param_dtype=torch.bfloat16 if gathers_bf16(config, world.device) else None,
        )
        distributed.fill(method, world, tensors)
    optimizer = optimizer_of(config, method)
    _check_schedules(config, method, optimizer)
    # What still draws from the global generators (dropout, other libraries' stochastic depth)
    # differs between ranks.
    _seed(config.seed + 1 + world.rank)
    return method, optimizer


def compile_each(modules: Iterable[nn.Module], **options: Any) -> None:
    """Compile modules in place; `options` as of torch.compile."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILED_KINDS)
    for module in modules:
        module.compile(**options)


def _whole_method(config: Config, world: World, train_set: PretrainingCrops) -> Method:
    """The method as it starts: by seed, and from weights if there are any."""
    loaded: list[tuple[nn.Module, LoadReport]] = []

    def prepare(encoder: nn.Module) -> None:
        # The other ranks get the values from the first.
        if config.model.weights is not None and world.is_main:
            report = load_pretrained(encoder, config.model.weights, quiet=True)
            loaded.append((encoder, report))
        if config.train.grad_checkpointing:
            if not hasattr(encoder, "set_grad_checkpointing"):
                raise ValueError(
                    f"train.grad_checkpointing: {config.model.name} has no blocks to checkpoint"
                )
            encoder.set_grad_checkpointing()

    _seed(config.seed)
    method = method_of(
        config,
        num_samples=num_samples(train_set, config.train.global_batch_size),
        steps_per_epoch=steps_per_epoch(train_set, config.train.global_batch_size),
        prepare=prepare,
    )
    for encoder, report in loaded:
        print(start_from(method, encoder, report))
    return method


def optimizer_of(config: Config, method: Method) -> Optimizer:
    """The optimizer that config.optim names, on the method's parameters as they are sharded."""
    optim = config.optim
    groups = {"layer_decay": optim.layer_decay, "fixed_lr": optim.fixed_lr}
    if optim.name == "sgd":
        return build_sgd(method, momentum=optim.momentum, **groups)
    if optim.name == "lars":
        trust = optim.trust_coefficient
        return build_lars(method, momentum=optim.momentum, trust_coefficient=trust, **groups)
    build = build_lamb if optim.name == "lamb" else build_adamw
    return build(method, betas=optim.betas, eps=optim.eps, **groups)


def scheduled(config: Config, step: int) -> dict[str, float]:
    """The value of each schedule, configured or the method's, in optimizer step `step`."""
    values = {}
    own = method_class(config.method.name).schedules
    for name in dict.fromkeys([*(f.name for f in fields(config.schedules)), *own]):
        schedule = getattr(config.schedules, name, None) or own.get(name)
        if name == "lr":
            optim, batch = config.optim, config.train.global_batch_size
            base = scale_lr(
                schedule.base, batch, scaling=optim.lr_scaling, reference=optim.lr_reference_batch
            )
            schedule = replace(schedule, base=base)
            if optim.fixed_lr:
                values["fixed_lr"] = base
        if schedule is not None:
            values[name] = schedule(step, config.train.steps)
    return values


def _check_schedules(config: Config, method: Method, optimizer: Optimizer) -> None:
    """Refuse a schedule that would do nothing."""
    for name in (f.name for f in fields(config.schedules)):
        given = getattr(config.schedules, name) is not None
        if given and name not in (*_OF_THE_OPTIMIZER, *method.schedules):
            raise ValueError(f"schedules.{name}: method {config.method.name} does not use it")
    last_layers = any(group["last_layer"] for group in optimizer.param_groups)
    if config.schedules.last_layer_lr is not None and not last_layers:
        raise ValueError("schedules.last_layer_lr: no module of the method is called last_layer")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
