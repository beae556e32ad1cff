"""`python -m fastssl.info`: versions, devices, and which backend runs each op here and why."""

import importlib.metadata
import platform

import torch

import fastssl.functional  # noqa: F401  (registers every op)
from fastssl.kernels.common import libraries
from fastssl.kernels.common.dispatch import BY_NAME_ONLY, OPS, choose_backend
from fastssl.version import __version__

_PACKAGES = ("torch", "triton", "numpy", "xformers", "flash-attn", "transformers")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"
    facts = torch.cuda.get_device_properties(device)
    memory = facts.total_memory / 2**30
    return f"{facts.name}, sm_{facts.major}{facts.minor}, {memory:.0f} GiB"


def lines() -> list[str]:
    """The report, line by line."""
    text = [f"fastssl {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    text += [f"  {package}: {_version(package)}" for package in _PACKAGES]
    text.append(f"CPU library: {libraries.why_no_cpp_library() or 'loaded'}")
    for device in devices():
        text.append(f"{device}: {describe(device)}")
        for name in sorted(OPS):
            op = OPS[name]
            arguments = op.example(device)
            try:
                chosen = choose_backend(op, None, *arguments)
            except ValueError as error:  # FASTSSL_BACKEND names one that cannot run
                chosen = f"none ({error})"
            text.append(f"  {name}: {chosen}")
            for backend, reason in op.reasons(*arguments).items():
                if backend != chosen:
                    reason = reason or BY_NAME_ONLY.get(backend) or "an earlier choice can run"
                    text.append(f"    not {backend}: {reason}")
    return text


if __name__ == "__main__":
    print("\n".join(lines()))
