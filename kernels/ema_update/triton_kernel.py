"""ema_update in Triton: one launch over a table of chunks of all tensors."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels.common.triton_utils import AotCase


@dataclass(frozen=True)
class Config:
    """One program updates STEPS times BLOCK elements."""

    BLOCK: int = 2048
    STEPS: int = 8
    num_warps: int = 8


CONFIG = Config()
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What vector loads of 16 bytes need; torch allocates by more, a view or a shard may start anywhere.
_ALIGNMENT = 16


@triton.jit
def _moved(target, source, weight, keep):
    """torch.lerp's two forms: each is exact at its own end."""
    target, source = target.to(tl.float32), source.to(tl.float32)
    difference = source - target
    return tl.where(weight < 0.5, target + weight * difference, source - keep * difference)


@triton.jit
def _ema_update_kernel(
    table_ptr,  # [chunks, 3] int64: address of target, address of source, number of elements
    momentum_ptr,  # [] float32, unused unless HAS_MOMENTUM
    weight,  # 1 - momentum
    keep,  # momentum
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = table_ptr + tl.program_id(0).to(tl.int64) * 3
    target_address = tl.load(row)
    source_address = tl.load(row + 1)
    count = tl.load(row + 2).to(tl.int32)
    target_ptr = target_address.to(tl.pointer_type(TARGET))
    source_ptr = source_address.to(tl.pointer_type(SOURCE))
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
    if HAS_MOMENTUM:
        keep = tl.load(momentum_ptr)
        weight = 1.0 - keep
    for step in range(STEPS):
        i = step * BLOCK + tl.arange(0, BLOCK)
        # A mask at any element would forbid vector loads, so only a tensor's last block has one.
        if (step + 1) * BLOCK <= count:
            moved = _moved(tl.load(target_ptr + i), tl.load(source_ptr + i), weight, keep)
            tl.store(target_ptr + i, moved.to(TARGET))
        else:
            inside = i < count
            target = tl.load(target_ptr + i, mask=inside, other=0.0)
            source = tl.load(source_ptr + i, mask=inside, other=0.0)
            moved = _moved(target, source, weight, keep)
            tl.store(target_ptr + i, moved.to(TARGET), mask=inside)


_captured: list[Tensor] = []


@functools.lru_cache(maxsize=64)
def _table(device: torch.device, sizes: tuple[int, int], pairs: tuple) -> tuple[Tensor, Tensor]:
    """The kernel's table on `device` for `pairs` of (target address, source address, elements) of
    `sizes` bytes each, and what it is a copy of. A table is a function of its arguments alone, so a
    kept one cannot be wrong; a model's own is found again at every step."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A replay would copy the table anew, from memory that others have by then.
        raise RuntimeError(
            "ema_update must have run on the same tensors before a CUDA graph captures it, got "
            f"{len(pairs)} pairs of tensors that it has not met"
        )
    chunk = CONFIG.BLOCK * CONFIG.STEPS
    targets, sources, counts = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    chunks = (counts + chunk - 1) // chunk
    owner = torch.repeat_interleave(torch.arange(len(pairs)), chunks)
    begin = (torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]) * chunk
    columns = (
        targets[owner] + begin * sizes[0],
        sources[owner] + begin * sizes[1],
        (counts[owner] - begin).clamp(max=chunk),
    )
    table = torch.stack(columns, dim=1)
    if device.type != "cuda":
        return table, table
    # From pinned memory, which stays until the copy is made, it waits for nobody.
    table = table.pin_memory()
    return table.to(device, non_blocking=True), table


def ema_update(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    """One launch for each pair of dtypes, and one more for tensors at odd addresses."""
    groups = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        if target.numel() == 0:
            continue
        pair = (target.data_ptr(), source.data_ptr(), target.numel())
        aligned = pair[0] % _ALIGNMENT == 0 and pair[1] % _ALIGNMENT == 0
        groups[target.dtype, source.dtype, aligned].append(pair)
    for (target_dtype, source_dtype, aligned), pairs in groups.items():
        sizes = (target_dtype.itemsize, source_dtype.itemsize)
        table, _ = _table(targets[0].device, sizes, tuple(pairs))
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            # The graph knows its address alone.
            _captured.append(table)
        _ema_update_kernel[(len(table),)](
            table,
            table if momentum_tensor is None else momentum_tensor,
            1.0 - momentum,
            momentum,
            TARGET=_TYPES[target_dtype],
            SOURCE=_TYPES[source_dtype],
            HAS_MOMENTUM=momentum_tensor is not None,
            ALIGNED=aligned,
            BLOCK=CONFIG.BLOCK,
            STEPS=CONFIG.STEPS,
            num_warps=CONFIG.num_warps,
        )


def aot_cases() -> list[AotCase]:
    """float32 teachers of float32 and of bfloat16 students."""
    signature = {"table_ptr": "*i64", "momentum_ptr": "*fp32", "weight": "fp32", "keep": "fp32"}
    sizes = {"BLOCK": CONFIG.BLOCK, "STEPS": CONFIG.STEPS}
    variants = {
        "fp32": (tl.float32, False, True),
        "bf16_student": (tl.bfloat16, True, True),
        "unaligned": (tl.float32, False, False),
    }
    return [
        AotCase(
            _ema_update_kernel,
            signature,
            {"TARGET": tl.float32, "SOURCE": source}
            | {"HAS_MOMENTUM": has_momentum, "ALIGNED": aligned}
            | sizes,
            CONFIG.num_warps,
            variant=variant,
        )
        for variant, (source, has_momentum, aligned) in variants.items()
    ]
