"""Compiles every Triton kernel ahead of time and prints what it uses, as JSON.

Run as `python -m tests.triton_aot`, in a process of its own: the compiler and Triton's interpreter
exclude each other. No GPU is needed; ptxas and cuobjdump come with the triton package.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastssl.functional  # noqa: F401  (registers every op)
from fastssl.kernels.common.dispatch import OPS

ARCHITECTURES = (80, 90, 100)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)")


def resources(case, architecture: int) -> dict[str, int]:
    """Shared, stack and local bytes of one kernel, and its registers."""
    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    names = list(case.kernel.arg_names)
    signature = {name: signature[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        dump = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        )
    registers, stack, local = map(int, _USAGE.search(dump.stdout + dump.stderr).groups())
    return {
        "shared": compiled.metadata.shared,
        "stack": stack,
        "local": local,
        "registers": registers,
    }


def main() -> None:
    table = {}
    for op in sorted(OPS):
        if "triton" not in OPS[op].backends:
            continue
        module = importlib.import_module(f"fastssl.kernels.{op}.triton_kernel")
        for case in module.aot_cases():
            for architecture in ARCHITECTURES:
                table[f"{case.name} sm_{architecture}"] = resources(case, architecture)
    json.dump(table, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
