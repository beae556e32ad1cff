"""Runs a case: contenders agree, then are timed interleaved on rotating inputs."""

import gc
import math
import os
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.registry import Case, Contender
from fastssl.kernels.common.dispatch import OPS, choose_backend

SEED = 20211111
# Sets of inputs together exceed this, so that a cache serves none of them twice; 8 at most.
ROTATED_BYTES = 256 << 20
MAX_SETS = 8


class Disagreement(Exception):
    """A contender's result differs from the first one's, so there is no number."""


def run_case(case: Case, device: torch.device, quick: bool = False) -> dict[str, object]:
    """One row of results: conditions, times, ratios, roofline and memory."""
    load = os.getloadavg()[0]
    torch.manual_seed(SEED)
    # float32 is float32, in convolutions too.
    torch.backends.cudnn.allow_tf32 = False
    # Where blocks are compiled one by one there are more kinds of them than torch expects.
    torch._dynamo.config.recompile_limit = 64
    # Each case compiles for its own sizes, not for what another case makes dynamic.
    torch.compiler.reset()
    contenders = case.contenders(device)
    inputs = [case.make_inputs(device)]
    contenders = check_agreement(case, contenders, inputs[0])
    size = sum(x.nbytes for x in inputs[0] if isinstance(x, Tensor))
    num_sets = 2 if quick else max(2, min(MAX_SETS, math.ceil(ROTATED_BYTES / max(1, size))))
    inputs += [case.make_inputs(device) for _ in range(num_sets - 1)]
    memory = {
        name: measure.peak_extra_bytes(function, inputs[0], device)
        for name, function in contenders.items()
        # A graph's memory was taken when it was recorded.
        if not name.endswith(" graphed")
    }
    bandwidth = measure.copy_bandwidth(device, quick)
    rate = measure.gemm_rate(device, getattr(torch, case.dtype), quick)
    times = time_interleaved(contenders, inputs, device, quick)
    median = {name: statistics.median(values) for name, values in times.items()}
    flops = dict.fromkeys(contenders, case.flops)
    if callable(case.flops):
        flops = case.flops(contenders, inputs[0])
    needed = {name: max(case.bytes_moved / bandwidth, flops[name] / rate) for name in contenders}
    row = {
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "backend": _automatic_backend(case.op, device),
        "rounds": len(next(iter(times.values()))),
        "ms": {name: [round(q, 4) for q in measure.quantiles(t)] for name, t in times.items()},
        "ratios": {
            name: round(median[base] / median[ours], 3)
            for name, (base, ours) in case.ratios.items()
            if base in median and ours in median
        },
        "bytes_moved": case.bytes_moved,
        "flops": flops,
        "roofline": {name: round(needed[name] / (median[name] * 1e-3), 4) for name in contenders},
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "gemm_tflop_per_s": round(rate / 1e12, 3),
        "peak_extra_bytes": memory,
        "load_average_before": round(load, 2),
    }
    if case.images:
        row["images_per_s"] = {name: round(case.images / t * 1e3, 2) for name, t in median.items()}
    return row | measure.conditions(device)


def check_agreement(
    case: Case, contenders: dict[str, Contender], inputs: Sequence
) -> dict[str, Contender]:
    """Those that run, whose results equal the first one's within the case's tolerance.

    Others' ways may fail, for want of memory or in their compiler, and are left out; ours may not.
    """
    results = {}
    for name, function in contenders.items():
        try:
            results[name] = function(*inputs)
        except Exception as error:
            if name.startswith("fastssl"):
                raise
            reason = str(error).strip().split("\n")[0]
            print(f"left out: {case.name}: {name}: {reason}", file=sys.stderr)
    first = next(iter(results))
    for name, values in results.items():
        if len(values) != len(results[first]):
            raise Disagreement(f"{case.name}: {name} and {first} return different things")
        for i, (actual, expected) in enumerate(zip(values, results[first], strict=True)):
            if name in case.independent and actual.shape == expected.shape:
                continue
            error = relative_error(actual, expected)
            if not error <= case.tolerance:
                raise Disagreement(
                    f"{case.name}: result {i} of {name} differs from {first}'s by {error:.1e}, "
                    f"allowed are {case.tolerance:.1e}"
                )
    return {name: contenders[name] for name in results}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference by that of `expected`; for integers 0 or infinity."""
    if actual.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual.long(), expected.long()) else math.inf
    difference = (actual.double() - expected.double()).norm()
    scale = expected.double().norm()
    return (difference / scale).item() if scale > 0 else difference.item()


def time_interleaved(
    contenders: dict[str, Contender],
    inputs: Sequence[tuple],
    device: torch.device,
    quick: bool,
) -> dict[str, list[float]]:
    """Milliseconds of every call: in each round all contenders run on one set of inputs, each round
    beginning with another contender."""
    clock = measure.Clock(device)
    names = list(contenders)
    warm = [
        sum(clock(contenders[name], inputs[i % len(inputs)]) for name in names) for i in range(2)
    ]
    seconds, least, most = (3.0 if device.type == "cuda" else 15.0, 7, 50)
    if quick:
        seconds, least, most = 0.2, 3, 5
    rounds = max(least, min(most, int(seconds * 1e3 / max(warm[-1], 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            for i in range(len(names)):
                name = names[(r + i) % len(names)]
                times[name].append(clock(contenders[name], inputs[r % len(inputs)]))
    finally:
        gc.enable()
    return times


def _automatic_backend(op: str | None, device: torch.device) -> str | None:
    if op is None:
        return None
    return choose_backend(OPS[op], None, *OPS[op].example(device))
