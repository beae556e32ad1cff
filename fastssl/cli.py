"""`fastssl-train RECIPE_OR_FILE key.sub=value ... [--resume]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

USAGE = "fastssl-train [RECIPE | FILE.yaml] [key.sub=value ...] [--resume] [--traceback]"
DESCRIPTION = """\
Pretrain an image encoder without labels: on bundled photographs (data=photos) or on any
folder of images (data=/path). On several GPUs: torchrun --nproc-per-node=8 -m fastssl.cli ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="fastssl-train", usage=USAGE, add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_intermixed_args(arguments)

    try:
        if options.help:
            print(help_text())
        else:
            run(options.words, options.resume)
    except ModuleNotFoundError as error:
        if options.traceback:
            raise
        print(f'fastssl-train: error: {error}; pip install "fastssl[train]"', file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if options.traceback:
            raise
        print(f"fastssl-train: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(words: Sequence[str], resume: bool) -> None:
    """Train by the recipe and the overrides in `words`."""
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from fastssl.training import config, loop

    recipe, overrides = config.DEFAULT_RECIPE, words
    if words and "=" not in words[0]:
        recipe, *overrides = words
    loop.train(config.load(recipe, overrides), resume=resume)


def help_text() -> str:
    """The command, the recipes, and every key with its type, default and meaning."""
    from fastssl.training import config, recipes

    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            DESCRIPTION,
            "",
            f"recipes: {', '.join(recipes.names())} (default: {config.DEFAULT_RECIPE})",
            "--resume: go on with a run that was stopped, or start it if there is none",
            "--traceback: show where an error came from",
            "",
            "keys, with default, [type] and meaning (a recipe changes the defaults):",
            config.describe(),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
