"""What the loss modules share: aliases of arguments, checks, the group, what is logged."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastssl.kernels.common import collectives
from fastssl.kernels.common.collectives import Group

Stats = dict[str, Tensor]


def aliases(**names: str) -> Callable:
    """Decorates an `__init__`: the keyword `alias` counts as the one it is mapped to."""

    def decorate(init: Callable) -> Callable:
        @functools.wraps(init)
        def wrapper(self: nn.Module, *args: object, **kwargs: object) -> None:
            for alias, name in names.items():
                if alias in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{name} and its alias {alias} were both given")
                    kwargs[name] = kwargs.pop(alias)
            init(self, *args, **kwargs)

        return wrapper

    return decorate


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_not_swapped(
    student_name: str, student: Tensor, teacher_name: str, teacher: Tensor
) -> None:
    """Refuse the one order that shapes cannot tell: a target that learns beside one that does not.

    A student without gradient is fine where the teacher has none either, as in evaluation.
    """
    if torch.is_grad_enabled() and teacher.requires_grad and not student.requires_grad:
        raise ValueError(
            f"{teacher_name} requires grad and {student_name} does not: are the two swapped?"
        )


def resolved(group: Group, gather_distributed: bool = True) -> str | None:
    """A group as a module keeps it: by name, so that the module can be copied and pickled.

    None is the default group at the time of the call; "" is this process alone, which is also what
    gather_distributed=False asks for.
    """
    if not gather_distributed:
        return ""
    return None if group is None else collectives.group_name(group)


def cross_entropy_stats(loss: Tensor, num_classes: int, **more: Tensor) -> Stats:
    """loss / ln K, which is 1 for a uniform student, and whatever else a loss has to tell."""
    return {"loss_over_log_k": loss.detach() / math.log(max(2, num_classes)), **more}
