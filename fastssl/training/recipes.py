"""Where the recipes are: <repo>/recipes in a checkout, fastssl/recipes in a wheel."""

from __future__ import annotations

from pathlib import Path

from fastssl.names import nearest

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """The folder of the shipped recipes."""
    checkout = PACKAGE.parent / "recipes"
    return PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else checkout


def names() -> list[str]:
    """The shipped recipes, as the command takes them."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(recipe: str) -> Path:
    """The file of a recipe by its name, a YAML file by its path, or the one in a run's folder."""
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ValueError(f"recipe file {path} does not exist; recipes: {', '.join(names())}")
    shipped = folder() / f"{recipe}.yaml"
    if recipe in names():
        return shipped
    if recipe and (path / "config.yaml").is_file():
        return path / "config.yaml"
    raise ValueError(
        f"recipe must be a YAML file, a run's folder or one of {', '.join(names())}; "
        f"got {recipe!r}, the nearest is {nearest(recipe, names())}"
    )
