"""What a benchmark case is, and the list of all cases."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels.common.dispatch import OPS

# Called with a set of inputs; returns what the contenders must agree on.
Contender = Callable[..., tuple[Tensor, ...]]

FORWARD, FORWARD_BACKWARD, STEP = "forward", "forward+backward", "step"


@dataclass(frozen=True)
class Case:
    """One row of results.

    `make_inputs(device)` draws a set of inputs, the arguments of every contender.
    `contenders(device)` builds the contenders; the first one is what the others must agree with, to
    a relative error of `tolerance` (norm of the difference; integers exactly). `ratios` maps the
    name of a ratio to the contenders whose medians it divides: (baseline, ours). `bytes_moved` and
    `flops` are what the work itself needs, the roofline's numerator; a callable counts the FLOPs of
    each contender on some inputs. `op` names the op whose backend is recorded; `images` is the
    batch of an end-to-end case. `independent` contenders draw random numbers of their own: only the
    shapes of their results are compared.
    """

    name: str
    shape: str
    dtype: str
    direction: str
    make_inputs: Callable[[torch.device], tuple]
    contenders: Callable[[torch.device], dict[str, Contender]]
    ratios: dict[str, tuple[str, str]]
    tolerance: float
    bytes_moved: int = 0
    flops: int | Callable[[dict[str, Contender], tuple], dict[str, int]] = 0
    op: str | None = None
    images: int = 0
    independent: tuple[str, ...] = ()


def forward_only(function: Callable) -> Contender:
    def call(*inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = function(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return call


def forward_backward(function: Callable) -> Contender:
    """The output and the gradients of every input that requires one; the last input is dout."""

    def call(*inputs) -> tuple[Tensor, ...]:
        *arguments, grad_output = inputs
        out = function(*arguments)
        leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_output))

    return call


def op_case(
    name: str,
    function: Callable,
    make_inputs: Callable[[torch.device], tuple],
    *,
    op: str,
    shape: str,
    dtype: torch.dtype,
    direction: str,
    bytes_moved: int,
    flops: int = 0,
    rival: Callable | None = None,
) -> Case:
    """A case of one op: eager and compiled reference, the automatic backend, and a rival if any.

    `function` takes the inputs and `backend`.
    """
    wrap = forward_only if direction == FORWARD else forward_backward

    def contenders(device: torch.device) -> dict[str, Contender]:
        def reference(*inputs):
            return function(*inputs, backend="reference")

        def ours(*inputs):
            return function(*inputs, backend=None)

        found = {
            "eager": wrap(reference),
            "compiled": wrap(torch.compile(reference)),
            "fastssl": wrap(ours),
        }
        # Not the automatic choice before it is measured: here is where.
        if _cannot_run_by_name("cuda", op, device) is None:
            found["fastssl cuda"] = wrap(lambda *inputs: function(*inputs, backend="cuda"))
        return found if rival is None else found | {"rival": wrap(rival)}

    ratios = {base: (base, "fastssl") for base in ("eager", "compiled", "rival")}
    ratios["cuda"] = ("fastssl cuda", "fastssl")
    if rival is None:
        del ratios["rival"]
    return Case(
        name=f"{name}/{str(dtype).removeprefix('torch.')}",
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        make_inputs=make_inputs,
        contenders=contenders,
        ratios=ratios,
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
        bytes_moved=bytes_moved,
        flops=flops,
        op=op,
    )


def _cannot_run_by_name(backend: str, op: str, device: torch.device) -> str | None:
    entry = OPS[op]
    if backend not in entry.backends:
        return f"{op} has no backend {backend}"
    return entry.backends[backend](*entry.example(device))


# On a GPU the batch is so many times that of two CPU cores, in cases whose size is their batch.
GPU_SCALE = 32


def all_cases(quick: bool = False, scale: int = 1) -> list[Case]:
    """Every case; `quick` ones are small and only show that everything runs."""
    from benchmarks import (
        cases_attention,
        cases_augment,
        cases_contrastive,
        cases_dino,
        cases_distillation,
        cases_gram,
        cases_masking,
        cases_mlp,
        cases_norm,
        cases_optim,
        cases_pool,
        cases_sinkhorn,
        cases_steps,
        cases_throughput,
    )

    # Whole models first, which a run of limited time should not end without.
    scaled = (cases_throughput, cases_steps, cases_distillation)
    scaled = (*scaled, cases_attention, cases_pool, cases_mlp, cases_norm)
    published = (cases_masking, cases_dino, cases_sinkhorn, cases_contrastive, cases_gram)
    published = (*published, cases_optim, cases_augment)
    scale = 1 if quick else scale
    found = [case for module in scaled for case in module.cases(quick, scale)]
    return found + [case for module in published for case in module.cases(quick)]


def select(names: list[str], quick: bool = False, scale: int = 1) -> list[Case]:
    """The cases called `names`, or below such a name ("masked_scatter" selects all its dtypes)."""
    cases = all_cases(quick, scale)
    if not names:
        return cases
    chosen = [c for c in cases if any(c.name == n or c.name.startswith(n + "/") for n in names)]
    for name in names:
        if not any(c.name == name or c.name.startswith(name + "/") for c in cases):
            known = ", ".join(dict.fromkeys(c.name.split("/")[0] for c in cases))
            raise ValueError(f"CASE must be one of {known} or a name below, got {name!r}")
    return chosen
