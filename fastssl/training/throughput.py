"""Model FLOPs utilisation (MFU; Chowdhery et al., 2022, arXiv:2204.02311).

The floating-point operations of the model's products in forward and backward, per second, as a
share of what the device can do. Waiting for data, the optimizer and communication take time and
count no operations, nor does what activation checkpointing computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from fastssl.distributed import World
from fastssl.training.config import Config
from fastssl.training.setup import uses_bf16

# TFLOP/s of dense products of bfloat16 summed in float32, from the makers' data sheets, by words of
# the device's name; the first line all of whose words are in the name counts.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("4090", 165.2),
    ("3090", 71.0),
)
# Parts of a card, and others that share its name and not its rate.
_OTHERS = {"MIG", "Laptop", "D", "Ti"}


def peak_tflops(device_name: str, *, bf16: bool) -> float | None:
    """TFLOP/s of a device at its best, None for one that is not known.

    In float32 that is the rate of TF32, half of bfloat16's on all of these, whether or not torch is
    allowed to use it.
    """
    words = set(device_name.replace("-", " ").split())
    if words & _OTHERS:
        return None
    rates = (rate for name, rate in PEAK_TFLOPS if set(name.split()) <= words)
    bf16_rate = next(rates, None)
    return bf16_rate if bf16 or bf16_rate is None else bf16_rate / 2


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_aten = torch.ops.aten
# torch's table has the CUDA kernels of attention only.
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of the ops called within that have a formula, torch's and this package's.

    Unlike torch's FlopCounterMode it leaves out what activation checkpointing computes again: the
    ops of a module whose forward runs within backward.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._again = 0  # forwards that run within backward
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> FlopCounter:
        self._hooks = [
            register_module_forward_pre_hook(self._enter_forward),
            # Checkpointing leaves a forward by an exception once it has what it needs.
            register_module_forward_hook(self._leave_forward, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _enter_forward(self, module: nn.Module, inputs: Any) -> None:
        self._again += _is_in_backward()

    def _leave_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._again -= _is_in_backward()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        op = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(op) or flop_registry.get(op)
        if formula is not None and not self._again:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Utilization:
    """MFU of a run, on rank 0: `counting` around forwards and backwards, then `measure`.

    The first micro-batch of the process is counted, which costs it some time and changes none of
    its bits. A compiled model cannot be counted: log.flops_per_image says it then.
    """

    def __init__(self, config: Config, world: World, say: Callable[[str], None]) -> None:
        log = config.log
        self._say = say
        self._peak = log.peak_tflops
        self._flops = log.flops_per_image
        self._has_to_count = False
        if not world.is_main:
            return
        on_gpu = world.device.type == "cuda"
        if self._peak is None and on_gpu:
            name = torch.cuda.get_device_name(world.device)
            self._peak = peak_tflops(name, bf16=uses_bf16(config, world.device))
            if self._peak is None:
                say(f"MFU is not shown: the peak rate of {name} is not known; give log.peak_tflops")
        if self._peak is None or self._flops is not None:
            return
        self._has_to_count = not config.train.compile
        if config.train.compile:
            say(
                "MFU is not shown: train.compile leaves nothing to count; give "
                "log.flops_per_image, which a run without it says"
            )

    @contextmanager
    def counting(self, num_images: int) -> Iterator[None]:
        """Around forward and backward of a micro-batch of so many images."""
        if not self._has_to_count:
            yield
            return
        with FlopCounter() as counter:
            yield
        self._has_to_count = False
        self._flops = counter.flops / num_images
        self._say(
            f"an image takes {self._flops:.4g} FLOPs in forward and backward "
            f"(log.flops_per_image); MFU is their share of {self._peak:g} TFLOP/s a device"
        )

    def measure(self, images_per_second_per_device: float) -> dict[str, float]:
        """{"mfu": share}; {} where it cannot be known."""
        if self._peak is None or self._flops is None:
            return {}
        return {"mfu": self._flops * images_per_second_per_device / (self._peak * 1e12)}
