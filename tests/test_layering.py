"""A lower floor never imports a higher one, and one kernel never imports another."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# From the lowest floor up; a name matches itself and what lies below it in the package.
FLOORS = [
    ["fastssl.version", "fastssl.names"],
    ["fastssl.kernels"],
    ["fastssl.functional"],
    ["fastssl.distributed", "fastssl.optim", "fastssl.data"],
    ["fastssl.nn", "fastssl.losses"],
    ["fastssl.models"],
    ["fastssl.methods"],
    ["fastssl.evaluation"],
    ["fastssl.training"],
    ["fastssl.export"],
    [
        *("fastssl.cli", "fastssl.cli_data", "fastssl.cli_embed", "fastssl.cli_eval"),
        *("fastssl.cli_export", "fastssl.info"),
    ],
]


def floor_of(module: str) -> int | None:
    for level, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    return f"fastssl.{name}" if parts[0] == "kernels" else name


def imports(path: Path) -> list[str]:
    """Modules that the file imports; `from package import name` counts as package.name too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


SOURCES = sorted(
    path for folder in ("fastssl", "kernels") for path in (REPOSITORY / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_flow_upwards_only(path):
    module = module_name(path)
    level = floor_of(module)
    for name in imports(path):
        assert name.split(".")[0] != "kernels", f"{path}: import fastssl.kernels instead"
        assert name.split(".")[0] != "torchvision", f"{path}: torchvision is never needed"
        target = floor_of(name)
        if level is not None and target is not None:
            assert target <= level, f"{module} imports {name} from a higher floor"
        kernel = module.split(".")[:3]
        if kernel[:2] == ["fastssl", "kernels"] and name.startswith("fastssl.kernels."):
            assert name.split(".")[2] in (kernel[-1], "common"), f"{module} imports {name}"


def test_every_module_has_a_floor():
    without = [
        module_name(path)
        for path in SOURCES
        if floor_of(module_name(path)) is None and module_name(path) != "fastssl"
    ]
    assert without == []
