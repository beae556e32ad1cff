"""The wheel and the sdist, built and installed away from the checkout."""

import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
# What a user with nothing but torch does first.
SCRIPT = """
import sys
import torch
import fastssl
from fastssl import DINOLoss, HieraL, functional as F
from fastssl.kernels.common import libraries
assert "torchvision" not in sys.modules and "omegaconf" not in sys.modules
x = torch.randn(2, 3, 8, requires_grad=True)
ids = torch.stack([torch.randperm(5) for _ in range(2)])
F.masked_scatter(x, torch.zeros(8), ids).sum().backward()
assert torch.equal(x.grad, torch.ones_like(x))
print(fastssl.__file__)
print(libraries.why_no_cpp_library())
"""


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(what: str, source: Path, target: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", source, "-o", target]
    run(*command, env={**os.environ, **environment})
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A copy of the committed files and what is not ignored, so that the build leaves no trace."""
    checkout = tmp_path_factory.mktemp("checkout")
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=REPOSITORY).split("\n")
    for name in filter(None, files):
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).exists():
            target.write_bytes((REPOSITORY / name).read_bytes())
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture  # anew for each test: setuptools takes up what an earlier build left in it
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory) -> Path:
    """An environment that holds torch and what fastssl requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    torch_version = torch.__version__.split("+")[0]
    run(folder / "bin/pip", "install", "--quiet", f"torch=={torch_version}")
    return folder


def imported(environment: Path, wheel: Path, away: Path) -> list[str]:
    """Lines that SCRIPT prints once `wheel` is installed, run in a folder of its own."""
    pip = [environment / "bin/pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel]
    run(*pip)
    run(environment / "bin/pip", "install", "--quiet", wheel)  # what it requires beside torch
    return run(environment / "bin/python", "-c", SCRIPT, cwd=away).splitlines()


def console_scripts(wheel: Path) -> dict[str, str]:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    points = configparser.ConfigParser()
    points.read_string(archive.read(name).decode())
    return dict(points["console_scripts"])


def test_wheel_from_the_sdist_imports_and_computes(unpacked, empty_environment, tmp_path):
    wheel = build("wheel", unpacked, tmp_path / "dist", FASTSSL_REQUIRE_CPP="1")
    assert "-py3-none-linux_" in wheel.name
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    # Errors name the library's source files, not the machine that built it.
    library = archive.read("fastssl/kernels/_cpu.so")
    assert b"csrc/cpu/indices.h" in library and str(unpacked).encode() not in library
    assert "fastssl/kernels/masked_scatter/op.py" in names
    assert "fastssl/recipes/photos.yaml" in names
    assert console_scripts(wheel) == {
        "fastssl-train": "fastssl.cli:main",
        "fastssl-eval": "fastssl.cli_eval:main",
        "fastssl-embed": "fastssl.cli_embed:main",
        "fastssl-data": "fastssl.cli_data:main",
        "fastssl-export": "fastssl.cli_export:main",
    }
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/"))]
    location, reason = imported(empty_environment, wheel, tmp_path)
    assert str(empty_environment) in location
    assert reason == "None"


def test_without_a_compiler_the_installation_is_pure_python(unpacked, empty_environment, tmp_path):
    wheel = build("wheel", unpacked, tmp_path / "dist", CXX="no-such-compiler")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    _, reason = imported(empty_environment, wheel, tmp_path)
    assert reason.startswith("the CPU library is not built")
