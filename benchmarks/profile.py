"""Where the time of a training step goes: `python -m benchmarks.profile [MODEL]`, on the CPU.

A masked autoencoder's step in bf16 autocast, batch 8, images of 224 x 224, with the fused AdamW.
Prints a table of kinds of ops by their share of the operators' own time.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from fastssl import models

STEPS = 5
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
    "pooling": ("aten::max", "scatter_", "mask_unit_pool"),
    "sums of bias gradients": ("aten::sum", "column_sums"),
}
# Parents of others: their own time is Python's and autograd's.
WRAPPERS = ("Backward", "evaluate_function", "AccumulateGrad")


def kind_of(name: str) -> str:
    if any(word in name for word in WRAPPERS) or name in ("linear", "gelu_mlp", "add_layer_norm"):
        return "dispatch and autograd"
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "everything else"


def shares(name: str) -> dict[str, float]:
    """Percent of the operators' own time by kind, the largest first."""
    torch.manual_seed(0)
    model = getattr(models, name)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    images = torch.randn(8, 3, 224, 224)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images)[0]
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    times: dict[str, float] = {}
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {kind: 100 * time / total for kind, time in ordered}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("model", nargs="?", default="mae_hiera_base_224", help="in fastssl.models")
    name = parser.parse_args().model
    print(f"| {name} | share |\n|---|--:|")
    for kind, share in shares(name).items():
        print(f"| {kind} | {share:.1f} % |")


if __name__ == "__main__":
    main()
