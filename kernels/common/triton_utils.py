"""Helpers of the Triton backends: device facts and the cases compiled ahead of time."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProperties:
    num_processors: int


@functools.cache
def device_properties(device: torch.device) -> DeviceProperties:
    """Facts that launchers size their grids by; a CPU (the interpreter) counts as one processor."""
    if device.type != "cuda":
        return DeviceProperties(num_processors=1)
    return DeviceProperties(torch.cuda.get_device_properties(device).multi_processor_count)


def cdiv(x: int, y: int) -> int:
    """triton.cdiv, which takes 20 times as long for numbers of the host."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """triton.next_power_of_2, likewise."""
    return 1 << max(0, n - 1).bit_length()


def batch_slices(batch: int, programs_per_slice: int, num_processors: int) -> int:
    """Slices of the batch that give every processor about four programs."""
    return max(1, min(batch, 4 * num_processors // max(1, programs_per_slice)))


@dataclass(frozen=True)
class AotCase:
    """One compilation at production sizes, for machines that have no GPU.

    `signature` maps each runtime argument to its Triton type ("*bf16", "i32", ...), `constexprs`
    the compile-time ones to their values. Pointers count as 16-byte aligned.
    """

    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int = 3
    variant: str = ""

    @property
    def name(self) -> str:
        name = self.kernel.__name__.strip("_")
        return f"{name}[{self.variant}]" if self.variant else name
