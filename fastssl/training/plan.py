"""Memory and communication of a training step, before there are any GPUs: `fastssl-train --plan`.

The formulas are derived in docs/scaling.md. Parameters and optimizer state are those of the method
itself, built without memory; what its blocks keep for backward follows from their shapes, and what
lies outside of the blocks is counted in one forward of two samples on the CPU.

T trained and F frozen elements, n ranks that share a copy, m copies, c bytes of a number that is
computed with, s of one of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastssl import distributed
from fastssl.data import Batch
from fastssl.methods import Method
from fastssl.nn import Block, Mlp
from fastssl.nn.block import LayerScale
from fastssl.nn.mask_units import HieraBlock
from fastssl.training import setup
from fastssl.training.config import Config

NUM_GPUS = (1, 8, 64, 256, 1024)
_SAMPLES = 2
# Those of ImageNet-1k: only banks of features are built for a number of samples.
_NUM_SAMPLES = 1_281_167
_COLUMNS = (
    "GPUs",
    "ranks a copy",
    "images a forward",
    "forwards",
    "parameters",
    "gradients",
    "optimizer",
    "gathered",
    "activations",
    "total",
    "activations, checkpointed",
    "total, checkpointed",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
)


@dataclass(frozen=True)
class Part:
    """What FSDP2 gathers at once: a block, or all that is in none. `calls`: forwards of a step."""

    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[bool, ...]
    calls: int = 1

    def elements(self, ranks: int, *, only_trained: bool = False) -> int:
        """Elements of the whole parameters, each as it is padded to be cut among `ranks`."""
        total = 0
        for shape, trained in zip(self.shapes, self.trained, strict=True):
            if trained or not only_trained:
                dim = distributed.shard_dim(shape, ranks)
                size = shape[dim] if shape else 1
                total += torch.Size(shape).numel() // max(size, 1) * -(-size // ranks) * ranks
        return total


@dataclass(frozen=True)
class BlockRun:
    """One forward of a block that is trained. Rows are tokens of one image."""

    rows_in: float
    rows_out: float
    dim_in: int
    dim_out: int
    hidden: int
    num_heads: int
    pools: bool
    scales: bool  # LayerScale

    def input_bytes(self, stream: int) -> float:
        return self.rows_in * self.dim_in * stream

    def saved_bytes(self, compute: int, stream: int) -> float:
        """What a block keeps for backward, of one image."""
        before = self.dim_in * (stream + compute) + 8 + 3 * self.dim_out * compute
        after = self.dim_out * (stream + 2 * compute) + 8 + 4 * self.num_heads
        after += self.hidden * compute + self.pools * self.dim_out
        after += 2 * self.scales * self.dim_out * compute
        if self.rows_out < self.rows_in and not self.pools:
            # All tokens attend, and some go on.
            before += self.dim_out * compute + 4 * self.num_heads
            after -= 4 * self.num_heads
        return self.rows_in * before + self.rows_out * after


@dataclass(frozen=True)
class Model:
    """A method as a plan sees it."""

    rest: Part
    blocks: tuple[Part, ...]
    optimizer_bytes: int
    runs: tuple[BlockRun, ...]
    outside_floats: float  # elements of an image that are kept outside of `runs`
    outside_bytes: float  # of integers and masks

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.rest, *self.blocks)

    def activations(self, compute: int, stream: int, *, checkpointing: bool) -> float:
        """Bytes that one image leaves for backward."""
        outside = self.outside_floats * compute + self.outside_bytes
        saved = [run.saved_bytes(compute, stream) for run in self.runs]
        if not checkpointing:
            return outside + sum(saved)
        inputs = [run.input_bytes(stream) for run in self.runs]
        again = max((s - i for s, i in zip(saved, inputs, strict=True)), default=0.0)
        return outside + sum(inputs) + again


@dataclass(frozen=True)
class Row:
    """One number of GPUs: bytes of one of them, and bytes that it sends in a step."""

    gpus: int
    shard_ranks: int
    images: int
    micro_batches: int
    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    checkpointed: float
    all_gather: float
    reduce_scatter: float
    all_reduce: float

    @property
    def state(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.gathered


def inspect(config: Config) -> Model:
    """The method of `config`, measured without training it."""
    with torch.device("meta"):
        method = setup.method_of(config, num_samples=_NUM_SAMPLES, steps_per_epoch=1)
    state = setup.optimizer_of(config, method).state
    optimizer_bytes = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    method.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*method.parameters(), *method.buffers()):
            # Large ones stay unwritten: pages that are only read take no memory.
            if tensor.numel() < 1 << 20:
                tensor.zero_()
    with _watched(method) as watch:
        method.before_step({n: s(0, config.train.steps) for n, s in method.schedules.items()})
        method(_batch(config))
    members = distributed.blocks(method)
    inside = {id(p) for block in members for p in block.parameters()}
    floats, others = watch.outside()
    return Model(
        rest=_part([p for p in method.parameters() if id(p) not in inside], 1),
        blocks=tuple(_part([*b.parameters()], watch.calls[id(b)]) for b in members),
        optimizer_bytes=optimizer_bytes,
        runs=tuple(watch.runs),
        outside_floats=floats / _SAMPLES,
        outside_bytes=others / _SAMPLES,
    )


def _part(parameters: Sequence[Tensor], calls: int) -> Part:
    shapes = tuple(tuple(p.shape) for p in parameters)
    return Part(shapes, tuple(p.requires_grad for p in parameters), calls)


def _batch(config: Config) -> Batch:
    views = [
        torch.zeros(_SAMPLES, 3, *view.size)
        for view in setup.kinds_of_views(config)
        for _ in range(view.number)
    ]
    return Batch(tuple(views), torch.arange(_SAMPLES))


class _Watch:
    """What a forward keeps outside of the blocks whose formula is known, and these blocks' runs."""

    def __init__(self, method: Method) -> None:
        self.calls = {id(block): 0 for block in distributed.blocks(method)}
        self.runs: list[BlockRun] = []
        self._own = {p.untyped_storage().data_ptr() for p in method.parameters()}
        self._kept: dict[int, Tensor] = {}
        self._inside = 0

    def enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls[id(block)] += 1
        self._inside += _is_known(block)

    def leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not _is_known(block):
            return
        self._inside -= 1
        if output.requires_grad:
            self.runs.append(_run(block, inputs[0], output))

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if not self._inside and storage not in self._own:
            self._kept[storage] = tensor
        return tensor

    def outside(self) -> tuple[float, float]:
        """(elements of floating-point tensors, bytes of others)."""
        floats = others = 0.0
        for tensor in self._kept.values():
            size = tensor.untyped_storage().nbytes()
            if tensor.is_floating_point():
                floats += size / tensor.element_size()
            else:
                others += size
        return floats, others


@contextmanager
def _watched(method: Method) -> Iterator[_Watch]:
    watch = _Watch(method)
    hooks = []
    for block in distributed.blocks(method):
        hooks.append(block.register_forward_pre_hook(watch.enter))
        hooks.append(block.register_forward_hook(watch.leave))
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        yield watch
    for hook in hooks:
        hook.remove()


def _is_known(block: nn.Module) -> bool:
    return isinstance(block, Block | HieraBlock) and isinstance(block.mlp, Mlp)


def _run(block: Block | HieraBlock, x: Tensor, output: Tensor) -> BlockRun:
    is_hiera = isinstance(block, HieraBlock)
    return BlockRun(
        rows_in=x.shape[0] * x.shape[1] / _SAMPLES,
        rows_out=output.shape[:-1].numel() / _SAMPLES,
        dim_in=x.shape[2],
        dim_out=output.shape[-1],
        hidden=block.mlp.fc1.out_features,
        num_heads=block.attn.heads if is_hiera else block.attn.num_heads,
        pools=is_hiera and block.attn.q_stride > 1,
        scales=not is_hiera and isinstance(block.ls1, LayerScale),
    )


def row(config: Config, model: Model, gpus: int) -> Row:
    """The plan for so many GPUs; ValueError where they cannot share the global batch."""
    train = config.train
    bf16 = train.precision != "fp32"
    gathers_bf16 = gpus > 1 and (
        bf16 if train.param_dtype == "auto" else train.param_dtype != "fp32"
    )
    compute, gather = (2 if bf16 else 4), (2 if gathers_bf16 else 4)
    micro_batches, images = _micro_batches(config, gpus)
    ranks = min(train.shard_ranks or gpus, gpus)
    if gpus % ranks:
        raise ValueError(f"train.shard_ranks must divide the {gpus} ranks, got {ranks}")
    copies = gpus // ranks

    parts = model.parts
    whole = [part.elements(ranks) for part in parts]
    trained = [part.elements(ranks, only_trained=True) for part in parts]
    largest, largest_trained = max(whole[1:], default=0), max(trained[1:], default=0)
    if gpus == 1:
        # Autocast's copies of the weights, which backward needs.
        gathered = 2 * sum(trained) if bf16 else 0
    else:
        gathered = gather * (whole[0] + 2 * largest + trained[0] + largest_trained)
        gathered += 4 * largest_trained
        if bf16 and not gathers_bf16:
            gathered += 2 * sum(trained)
    # A gradient is cut among the ranks once it is complete.
    gradients = 4 * sum(trained) / (ranks if micro_batches == 1 else 1)

    # The rest stays gathered until backward; a block is gathered again where it has one.
    sent = whole[0] + sum(
        elements * part.calls * (2 if any(part.trained) else 1)
        for part, elements in zip(parts[1:], whole[1:], strict=True)
    )
    others = (ranks - 1) / ranks
    kept = {
        checkpointing: images
        * model.activations(compute, gather if bf16 else 4, checkpointing=checkpointing)
        for checkpointing in (False, True)
    }
    return Row(
        gpus,
        ranks,
        images,
        micro_batches,
        parameters=4 * sum(whole) / ranks,
        gradients=gradients,
        optimizer=model.optimizer_bytes / ranks,
        gathered=gathered,
        activations=kept[False],
        checkpointed=kept[True],
        all_gather=micro_batches * others * gather * sent,
        reduce_scatter=others * 4 * sum(trained),
        all_reduce=2 * (copies - 1) / copies * 4 * sum(trained) / ranks,
    )


def _micro_batches(config: Config, gpus: int) -> tuple[int, int]:
    """(forwards of a step, images of one). The configured accumulation is meant for few GPUs: where
    there are more than it leaves images for, there is less of it."""
    train = config.train
    share, rest = divmod(train.global_batch_size, gpus)
    if rest or not share:
        raise ValueError(
            f"train.global_batch_size must be a multiple of {gpus} ranks, "
            f"got {train.global_batch_size}"
        )
    if train.device_batch_size is not None:
        images = min(train.device_batch_size, share)
    else:
        images = max(share // train.accumulation, 1)
    if share % images:
        raise ValueError(
            f"train.global_batch_size: {share} images a rank are no multiple of {images}"
        )
    return share // images, images


def plan(config: Config, num_gpus: Sequence[int] = NUM_GPUS) -> str:
    """The plan as text, with one row of a Markdown table for each number of GPUs."""
    model = inspect(config)
    trained = sum(part.elements(1, only_trained=True) for part in model.parts)
    frozen = sum(part.elements(1) for part in model.parts) - trained
    lines = [
        f"{config.method.name} with {config.model.name}: {trained / 1e6:.1f} M parameters trained, "
        f"{frozen / 1e6:.1f} M not (teacher, fixed embeddings), {len(model.blocks)} blocks",
        f"global batch {config.train.global_batch_size}, precision {config.train.precision}, "
        f"optimizer {config.optim.name}",
        "GB (10^9 bytes) of one GPU; the last three columns are what it sends in a step",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---:|" * len(_COLUMNS),
    ]
    for gpus in num_gpus:
        try:
            lines.append(_cells(row(config, model, gpus)))
        except ValueError as error:
            lines.append(f"| {gpus} | {error} |" + " |" * (len(_COLUMNS) - 2))
    return "\n".join(lines)


def _cells(row: Row) -> str:
    sizes = (
        row.parameters,
        row.gradients,
        row.optimizer,
        row.gathered,
        row.activations,
        row.state + row.activations,
        row.checkpointed,
        row.state + row.checkpointed,
        row.all_gather,
        row.reduce_scatter,
        row.all_reduce,
    )
    cells = [row.gpus, row.shard_ranks, row.images, row.micro_batches]
    return "| " + " | ".join([*map(str, cells), *(f"{size / 1e9:.2f}" for size in sizes)]) + " |"
