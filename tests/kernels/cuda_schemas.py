"""Stand-ins for torch.ops.fastssl_cuda that hold callers to the schemas in csrc/cuda/*.cu."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
_DEFINITION = re.compile(r'm\.def\(((?:\s*"[^"]*")+)\)')
_TYPES = {"Tensor": torch.Tensor, "int": int, "float": float, "bool": bool}


def schemas() -> dict[str, torch._C.FunctionSchema]:
    """Those that the sources define, by name."""
    found = {}
    for source in SOURCES.glob("*.cu"):
        for strings in _DEFINITION.findall(source.read_text()):
            text = "".join(re.findall(r'"([^"]*)"', strings))
            schema = torch._C.parse_schema(f"fastssl_cuda::{text}")
            found[schema.name.split("::")[1]] = schema
    return found


def held_to(schema: torch._C.FunctionSchema, function: Callable) -> Callable:
    def call(*arguments: object) -> object:
        assert len(arguments) == len(schema.arguments), schema
        for argument, expected in zip(arguments, schema.arguments, strict=True):
            kind = str(expected.type)
            optional = kind.startswith("Optional[")
            if optional and argument is None:
                continue
            kind = _TYPES[kind.removeprefix("Optional[").removesuffix("]")]
            assert isinstance(argument, kind), f"{schema.name}: {expected.name} is {argument!r}"
            assert kind is bool or not isinstance(argument, bool), f"{expected.name} is a bool"
        return function(*arguments)

    return call


def stand_ins(ops: object) -> SimpleNamespace:
    """Of every op that `ops` has a method for, by the op's name."""
    return SimpleNamespace(
        **{
            name: held_to(schema, getattr(ops, name))
            for name, schema in schemas().items()
            if hasattr(ops, name)
        }
    )
