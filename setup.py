"""Packages and compiled libraries; everything else about the project is in pyproject.toml."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_env():
    """kernels/common/env.py by path: the one file that reads FASTSSL_* variables."""
    spec = importlib.util.spec_from_file_location("env", ROOT / "kernels/common/env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


env = load_env()

COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fvisibility=hidden"),
    *("-Wall", "-Wextra"),
    # Errors name a file of the project, not of the machine that built it.
    f"-ffile-prefix-map={ROOT.resolve()}{os.sep}=",
    # torch 2.11 is the oldest version that the library must load into.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]

NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-DUSE_CUDA", COMPILE_FLAGS[-1], "-cudart", "static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"),
]
CPU, CUDA = "fastssl.kernels._cpu", "fastssl.kernels._cuda"


class BuildLibraries(build_ext):
    """Builds fastssl/kernels/_cpu.so and _cuda.so: plain shared libraries on libtorch's stable ABI,
    without Python's or ATen's headers, so that one binary serves every Python and every
    torch >= 2.11.

    No compiler or no torch in the build environment: no library, and still an installation.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            name, required = "CPU", env.require_cpp()
            if ext.name == CUDA:
                name, required = "CUDA", env.build_cuda() is True
            try:
                self.build_extension(ext)
            except (ImportError, OSError, subprocess.CalledProcessError) as error:
                if required:
                    raise
                print(f"fastssl: installing without the {name} library: {error}", file=sys.stderr)
                self.extensions.remove(ext)

    def build_extension(self, ext: Extension) -> None:
        torch_spec = importlib.util.find_spec("torch")
        if torch_spec is None:
            raise ImportError("torch is not installed in the build environment")
        torch_folder = Path(torch_spec.origin).parent
        compiler, flags = self.compiler_of(ext)
        target, temp = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp, ext.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir(parents=True, exist_ok=True)
        objects = [str(temp / Path(source).with_suffix(".o").name) for source in ext.sources]
        commands = [
            [compiler, *flags, "-isystem", str(torch_folder / "include")]
            + ["-c", str(ROOT / source), "-o", obj]
            for source, obj in zip(ext.sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        link = [compiler, "-shared", *objects, "-o", str(target)]
        link += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        if ext.name == CUDA:
            # libtorch has no symbols of its own: kept, it brings libtorch_cuda's.
            link += ["-Xlinker", "--no-as-needed", "-ltorch", "-cudart", "static"]
        subprocess.run(link, check=True)

    def compiler_of(self, ext: Extension) -> tuple[str, list[str]]:
        if ext.name == CPU:
            compiler = shutil.which(env.cxx())
            if compiler is None:
                raise OSError(f"no C++ compiler called {env.cxx()}")
            return compiler, COMPILE_FLAGS
        compiler = env.nvcc()
        if compiler is None:
            raise OSError("no nvcc")
        codes = [
            f"-gencode=arch=compute_{number},code=sm_{number}"
            for number in env.cuda_architectures()
        ]
        return compiler, [*NVCC_FLAGS, *codes]


def tag_as_any_python() -> dict:
    """The library holds no Python, so the wheel is py3-none-<platform>."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # setuptools < 70.1
        from wheel.bdist_wheel import bdist_wheel

    class AnyPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"bdist_wheel": AnyPython}


def torch_is_cuda_build() -> bool:
    """Without importing torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return spec is not None and bool(
        list((Path(spec.origin).parent / "lib").glob("libtorch_cuda.so"))
    )


def libraries() -> list[Extension]:
    if platform.system() != "Linux":
        return []

    def sources(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))

    found = [Extension(CPU, sources("cpu/*.cpp"))] if env.build_cpp() else []
    wants_cuda = env.build_cuda()
    if wants_cuda is None:
        wants_cuda = env.nvcc() is not None and torch_is_cuda_build()
    return found + [Extension(CUDA, sources("cuda/*.cu"))] * wants_cuda


# <repo>/kernels/<name> is installed as fastssl.kernels.<name>, <repo>/recipes as fastssl/recipes.
kernels = {f"fastssl.kernels.{name}": f"kernels/{name}" for name in find_packages("kernels")}

setup(
    packages=[*find_packages(include=["fastssl", "fastssl.*"]), *kernels, "fastssl.recipes"],
    package_dir={"fastssl": "fastssl", "fastssl.recipes": "recipes", **kernels},
    package_data={"fastssl.recipes": ["*.yaml"]},
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries, **tag_as_any_python()},
)
