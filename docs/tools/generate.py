"""The parts of the documentation that are read off the code: `python docs/tools/generate.py`.

A part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`. This command writes those in
WRITTEN into the pages; the rest, which change with every key, are filled in when the site is built.
"""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fastssl import cli_data, cli_embed, cli_eval, cli_export, functional, kernels
from fastssl.kernels.common import dispatch
from fastssl.methods import METHODS, Method
from fastssl.training import config, recipes

DOCS = Path(__file__).parents[1]
_PART = re.compile(r"<!-- begin: (\S+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
# "et al." and initials end none.
_SENTENCE = re.compile(r".+?(?<! al)[.?!](?=\s|$)")
# What a method's encoder must be, where it is not just any.
_ENCODERS = {
    "Module": "any",
    "VisionTransformer": "a Vision Transformer",
    "MaskedAutoencoderViT": "a masked autoencoder of ViT (`mae_vit_...`)",
    "MaskedAutoencoderHiera": "a masked autoencoder of Hiera (`mae_hiera_...`)",
}


def methods() -> str:
    """A section for each method."""
    used_by: dict[str, list[str]] = {name: [] for name in METHODS}
    for recipe in recipes.names():
        used_by[_values(recipe)["method"]["name"]].append(f"`{recipe}`")
    return "\n\n".join(_method(name, cls, used_by[name]) for name, cls in METHODS.items())


def _method(name: str, cls: type[Method], used_by: list[str]) -> str:
    small = [recipe for recipe in used_by if recipe[1:].startswith("photos")]
    published = [recipe for recipe in used_by if recipe not in small]
    arguments = ", ".join(f"`{word}`" for word in _arguments(cls)) or "none"
    lines = [
        f"### `{name}`",
        f"{_first_sentence(cls)} {_linked(_paper(cls))}",
        f"- Recipes: {', '.join(published)}; small: {', '.join(small)}.",
        f"- Encoder: {_ENCODERS[_type_name(cls)]}. Views of an image: {_views(cls)}.",
        f"- Arguments (`method.args`): {arguments}; see [{cls.__name__}]"
        f"(reference/methods.md#fastssl.methods.{cls.__name__}).",
    ]
    if cls.schedules:
        names = ", ".join(f"`schedules.{schedule}`" for schedule in cls.schedules)
        lines.append(f"- Schedules of its own: {names}.")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _type_name(cls: type[Method]) -> str:
    return cls.encoder_type.__name__


def _paper(cls: type[Method]) -> str:
    return _paragraph(inspect.getmodule(cls).__doc__)


def _first_sentence(documented: object) -> str:
    return _SENTENCE.match(_paragraph(inspect.getdoc(documented)))[0]


def _paragraph(docstring: str) -> str:
    """The first one, in one line, with a full stop."""
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.sub(r":*$", "", text).rstrip(".") + "."


def _views(cls: type[Method]) -> str:
    numbers: dict[str, int] = {}
    for group in cls.views:
        size = f" of {group['size']} pixels" if "size" in group else ""
        numbers[size] = numbers.get(size, 0) + group.get("number", 1)
    return ", ".join(f"{number}{size}" for size, number in numbers.items())


def _arguments(cls: type[Method]) -> list[str]:
    """Keywords with their defaults; without, where a class passes them on and may change them."""
    found: dict[str, str] = {}
    passed_on = False
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(parent.__init__).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.name not in found:
                found[p.name] = p.name if passed_on else f"{p.name}={p.default!r}"
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        passed_on = True
    return list(found.values())


def _linked(text: str) -> str:
    return re.sub(r"arXiv[: ](\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def published_recipes() -> str:
    """A table of the recipes of published runs."""
    return _recipes([name for name in recipes.names() if not name.startswith("photos")])


def small_recipes() -> str:
    """A table of the recipes on the bundled photographs."""
    return _recipes([name for name in recipes.names() if name.startswith("photos")])


def _recipes(names: list[str]) -> str:
    rows = ["| recipe | what it is | encoder | steps x batch |", "|---|---|---|--:|"]
    for name in names:
        values = _values(name)
        train = values["train"]
        what = _linked(_header(recipes.find(name)))
        size = f"{train['steps']:,} x {train['global_batch_size']:,}"
        rows.append(f"| `{name}` | {what} | `{values['model']['name']}` | {size} |")
    return "\n".join(rows)


@functools.cache
def _values(recipe: str) -> dict[str, dict[str, Any]]:
    """What the file says; `config.load` checks it too, which takes longer."""
    said = yaml.safe_load(recipes.find(recipe).read_text(encoding="utf-8"))
    defaults = {"method": {"name": config.MethodConfig().name}}
    groups = ("method", "model", "train")
    return {group: defaults.get(group, {}) | said.get(group, {}) for group in groups}


def _header(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() in ("#", "") or not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    return _SENTENCE.match(text)[0]


def ops() -> str:
    """A section for each function of fastssl.functional: what it is, its formula, its backends."""
    return "\n\n".join(_op(name) for name in functional.__all__ if name.islower())


def _op(name: str) -> str:
    function = getattr(functional, name)
    link = f"[`{name}`](reference/functional.md#fastssl.functional.{name})"
    parts = [f"### {link}", _linked(_first_sentence(function))]
    kernel = getattr(kernels, name, None)
    if kernel is None:
        return "\n\n".join([*parts, "Made of `masked_unfold` and a matrix product."])
    formula = re.search(r"::\n\n((?:    .*\n|\n)+)", kernel.__doc__)
    parts.append(f"```text\n{inspect.cleandoc(formula[1])}\n```")
    backends = ", ".join(f"`{backend}`" for backend in dispatch.OPS[name].backends)
    more = f"[Bytes and memory](reference/kernels.md#fastssl.kernels.{name})"
    parts.append(f"Backends: {backends}. {more}.")
    return "\n\n".join(parts)


def kernel_docs() -> str:
    """The docstring of every kernel's package."""
    options = "    options: {members: false, show_root_heading: true, show_root_toc_entry: true}"
    names = [n for n in functional.__all__ if n.islower() and hasattr(kernels, n)]
    return "\n\n".join(f"::: fastssl.kernels.{name}\n{options}" for name in names)


def keys() -> str:
    """Every key of the configuration, as the command prints them."""
    return f"```text\n{config.describe().strip()}\n```"


def help_of(module) -> Callable[[], str]:
    """What a command prints for --help."""

    def text() -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            module.main(["--help"])
        return f"```text\n{out.getvalue().strip()}\n```"

    return text


WRITTEN: Mapping[str, Callable[[], str]] = {
    "methods": methods,
    "published-recipes": published_recipes,
    "small-recipes": small_recipes,
    "ops": ops,
}
FILLED_IN: Mapping[str, Callable[[], str]] = {
    "keys": keys,
    "kernels": kernel_docs,
    "fastssl-data": help_of(cli_data),
    "fastssl-eval": help_of(cli_eval),
    "fastssl-embed": help_of(cli_embed),
    "fastssl-export": help_of(cli_export),
}


def fill(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The page with `parts` made anew; others stay as they are."""

    def part(match: re.Match) -> str:
        name = match[1]
        if name not in parts:
            return match[0]
        return f"<!-- begin: {name} -->\n{parts[name]()}\n<!-- end: {name} -->"

    return _PART.sub(part, page)


def main() -> None:
    """Write the parts in WRITTEN."""
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = fill(before, WRITTEN)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path} is new")


if __name__ == "__main__":
    main()
