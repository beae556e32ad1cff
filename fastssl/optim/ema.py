"""A teacher that follows its student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastssl import distributed
from fastssl.functional import ema_update

BUFFERS = ("average", "copy", "keep")


@dataclass(frozen=True)
class _Slot:
    """Where a module holds a tensor. The tensor is looked up at each use, since FSDP2 and
    load_state_dict(assign=True) put others in its place."""

    holder: dict[str, Tensor]
    key: str

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.key]


class EMA:
    """teacher <- momentum * teacher + (1 - momentum) * student, once per optimizer step.

        ema = EMA(teacher, student)
        ema.step(0.0)                     # the teacher becomes a copy, if it is not one yet
        for micro_batches in batches:
            ...                           # forward and backward of each
            optimizer.step()
            ema.step(momentum)            # not in between: the rate would depend on accumulation

    The two are paired by name, whatever torch.compile puts before it, and need the same names and
    shapes; dtypes may differ (a float32 teacher of a bfloat16 student). The teacher's parameters
    are set not to require gradients. Under FSDP2 both must be wrapped alike, before or after this;
    each rank updates its own shards and nothing is communicated. There is no state to save beyond
    the teacher's own.

    buffers: what becomes of the teacher's (batch statistics): "average" as parameters are, "copy"
    the student's, or "keep" those that its own forward has made. Buffers that are not
    floating-point are copied instead of averaged.

    Raises:
        ValueError: names or shapes differ, the two share a tensor, or `buffers` is another word.
        TypeError: teacher or student is no module.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, *, buffers: str = "average") -> None:
        for name, module in (("teacher", teacher), ("student", student)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a Module, got {type(module).__name__}")
        if buffers not in BUFFERS:
            raise ValueError(f"buffers must be one of {', '.join(BUFFERS)}, got {buffers!r}")
        self._modules = (teacher, student)
        self._averaged = list(_pairs(teacher, student, "_parameters"))
        self._copied: list[tuple[_Slot, _Slot]] = []
        if buffers != "keep":
            for pair in _pairs(teacher, student, "_buffers"):
                averages = buffers == "average" and pair[0].tensor.is_floating_point()
                (self._averaged if averages else self._copied).append(pair)
        teacher.requires_grad_(False)

    @torch.no_grad()
    def step(self, momentum: float | Tensor) -> None:
        """Advance the teacher; `momentum` in [0, 1] is a number or a 0-d tensor on its device.

        To be called where parameters are sharded if FSDP2 shards them, as after optimizer.step().
        """
        for module in self._modules:
            # A forward without a backward leaves the full parameters of a root in place, and what
            # were written into those would be lost.
            distributed.reshard(module)
        ema_update(
            [teacher.tensor for teacher, _ in self._averaged],
            [student.tensor for _, student in self._averaged],
            momentum=momentum,
        )
        for teacher, student in self._copied:
            teacher.tensor.copy_(student.tensor)


def _slots(module: nn.Module, kind: str) -> Iterator[tuple[str, _Slot]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, tensor in getattr(owner, kind).items():
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                yield name.replace("_orig_mod.", ""), _Slot(getattr(owner, kind), key)


def _pairs(teacher: nn.Module, student: nn.Module, kind: str) -> Iterator[tuple[_Slot, _Slot]]:
    """(teacher's, student's), each tensor of the teacher once however often it is used."""
    noun = {"_parameters": "parameter", "_buffers": "buffer"}[kind]
    teachers, students = dict(_slots(teacher, kind)), dict(_slots(student, kind))
    for one, other, who in ((teachers, students, "teacher"), (students, teachers, "student")):
        if alone := [name for name in one if name not in other]:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            raise ValueError(
                f"teacher and student must have {noun}s of the same names, got "
                f"{', '.join(alone[:3])}{more} in the {who} only"
            )
    seen: set[int] = set()
    for name, slot in teachers.items():
        if id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            _check_pair(f"{noun} {name}", slot.tensor, students[name].tensor)
            yield slot, students[name]


def _check_pair(name: str, teacher: Tensor, student: Tensor) -> None:
    if teacher is student:
        raise ValueError(f"teacher must have tensors of its own, got the student's as {name}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher and student must have {name} of one shape, got {list(teacher.shape)} and "
            f"{list(student.shape)}"
        )
    if isinstance(teacher, DTensor) != isinstance(student, DTensor):
        sharded = "teacher" if isinstance(teacher, DTensor) else "student"
        raise ValueError(
            f"teacher and student must be sharded alike, got {name} sharded in the {sharded} only"
        )
