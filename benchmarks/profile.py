"""Where the time of a training step goes: `python -m benchmarks.profile [MODEL...]`, on the CPU.

A masked autoencoder's step in bf16 autocast, batch 8, images of 224 x 224, with the fused AdamW:
before, with every op as its formula in plain torch (FASTSSL_BACKEND=reference), and after, with the
kernels. Prints kinds of ops by their share of the operators' own time; `--json FILE` keeps them.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.cases_steps import pretraining
from benchmarks.measure import conditions
from fastssl import models

MODELS = ("mae_hiera_tiny_224", "mae_hiera_base_224", "mae_vit_base_patch16")
RESULTS = report.RESULTS / "profiles"
# What runs the ops: FASTSSL_BACKEND, "" for the automatic choice.
SIDES = {"before": "reference", "after": ""}
STEPS = 5
OTHER, DISPATCH = "everything else", "dispatch and autograd"
# The first kind whose words appear in an op's name counts it.
KINDS = {
    "matrix products": (
        *("aten::mm", "aten::addmm", "_linear_pointwise", "aten::linear"),
        *("linear_product", "linear_weight_gradient"),
    ),
    "attention": ("attention", "bmm", "softmax", "aten::mul"),
    "GELU": ("gelu",),
    "optimizer": ("adamw", "Optimizer"),
    "LayerNorm": ("layer_norm",),
    "copies, casts and transposes": ("copy", "cast", "transpose", "aten::cat"),
    "pooling": ("aten::max", "aten::amax", "scatter_", "mask_unit_pool"),
    "sums of bias gradients": ("aten::sum", "column_sums"),
}
# Parents of others: their own time is Python's and autograd's.
WRAPPERS = ("Backward", "evaluate_function", "AccumulateGrad")


def kind_of(name: str) -> str:
    if any(word in name for word in WRAPPERS) or name in ("linear", "gelu_mlp", "add_layer_norm"):
        return DISPATCH
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return OTHER


def profile_step(name: str, backend: str = "") -> dict[str, object]:
    """A step of fastssl.models' `name`: its median "ms", measured without the profiler, and each
    kind's "shares" of the operators' own time, in percent."""
    torch.manual_seed(0)
    model = getattr(models, name)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    images, forward = torch.randn(8, 3, 224, 224), pretraining(model)

    def step() -> float:
        begin = perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(images)[0]
        loss.backward()
        optimizer.step()
        return perf_counter() - begin

    with patch.dict(os.environ, FASTSSL_BACKEND=backend):
        for _ in range(3):
            step()
        seconds = median(step() for _ in range(STEPS))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                step()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {"ms": 1e3 * seconds, "shares": {k: 100 * time / total for k, time in times.items()}}


def table(rows: Sequence[report.Row]) -> str:
    """Markdown: kinds of ops, and of each model two columns, before and after."""
    columns = [(row, side) for row in rows for side in SIDES]
    names = [f"{row['case'].removeprefix('profile/')} {side}" for row, side in columns]
    kinds = sorted(
        dict.fromkeys(kind for row, side in columns for kind in row[side]["shares"]),
        key=lambda kind: -max(row["before"]["shares"].get(kind, 0.0) for row in rows),
    )
    lines = [f"| share of the operators' time | {' | '.join(names)} |"]
    lines.append("|---|" + "--:|" * len(columns))
    for kind in kinds:
        cells = [f"{row[side]['shares'].get(kind, 0.0):.1f} %" for row, side in columns]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    times = [f"{row[side]['ms']:.0f} ms" for row, side in columns]
    lines.append(f"| a step, not profiled | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def tables(files: Iterable[Path]) -> str:
    """Each file's table under a line with its conditions."""
    parts = []
    for file in files:
        rows = report.read_rows([file])
        for line in dict.fromkeys(report.conditions_of(row) for row in rows):
            same = [row for row in rows if report.conditions_of(row) == line]
            parts.append(f"{line}\n\n{table(same)}")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=MODELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the rows into this file")
    options = parser.parse_args(arguments)
    for name in options.models:
        if not name.startswith("mae_") or not hasattr(models, name):
            parser.error(f"MODEL must be a masked autoencoder of fastssl.models, got {name!r}")
    for name in options.models:
        sides = {side: profile_step(name, backend) for side, backend in SIDES.items()}
        row = conditions(torch.device("cpu")) | {"case": f"profile/{name}", **sides}
        print(table([row]), flush=True)
        if options.json is not None:
            report.write_rows(options.json, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
