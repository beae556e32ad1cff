"""`fastssl-train RECIPE_FILE_OR_RUN key.sub=value ... [--resume [auto|CHECKPOINT]]`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = (
    "fastssl-train [RECIPE | FILE.yaml | RUN] [key.sub=value ...] "
    "[--resume [auto|CHECKPOINT]] [--profile] [--plan [--gpus=N,N]] [--traceback]"
)
DESCRIPTION = """\
Pretrain an image encoder without labels: on bundled photographs (data=photos) or on any
folder of images (data=/path). On several GPUs: torchrun --nproc-per-node=8 -m fastssl.cli ..."""


# Errors that say in a sentence what is wrong; any other is a defect, and shows where.
SAID = (ValueError, OSError, ImportError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="fastssl-train", usage=USAGE, add_help=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--resume", type=_checkpoint, default=False)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus")
    parser.add_argument("--traceback", action="store_true")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_intermixed_args(_with_resume_named(words))

    try:
        if options.help:
            print(help_text())
        elif options.plan:
            print(plan_text(options.words, options.gpus))
        else:
            run(options.words, options.resume, options.profile)
    except ModuleNotFoundError as error:
        if options.traceback:
            raise
        print(f'fastssl-train: error: {error}; pip install "fastssl[train]"', file=sys.stderr)
        return 1
    except SAID as error:
        if options.traceback:
            raise
        print(f"fastssl-train: error: {error}", file=sys.stderr)
        return 1
    return 0


def _with_resume_named(words: Sequence[str]) -> list[str]:
    """A bare `--resume` as `--resume=auto`. A recipe or an override may come after it, which no
    name of a checkpoint can be taken for."""
    words = list(words)
    for i in reversed(range(len(words))):
        if words[i] == "--resume":
            following = words[i + 1] if i + 1 < len(words) else ""
            if following == "auto" or re.fullmatch(r"step_\d+|latest", Path(following).name):
                del words[i + 1]
            else:
                following = "auto"
            words[i] = f"--resume={following}"
    return words


def _checkpoint(word: str) -> bool | Path:
    return True if word == "auto" else Path(word)


def run(words: Sequence[str], resume: bool | Path, profile: bool = False) -> None:
    """Train by the recipe and the overrides in `words`."""
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from fastssl.training import config, loop
    from fastssl.training.memory import keep_freed_memory

    keep_freed_memory()
    loop.train(config.load(*_recipe_and_overrides(words)), resume=resume, profile=profile)


def plan_text(words: Sequence[str], gpus: str | None) -> str:
    """Memory and communication of a step by the recipe and the overrides in `words`."""
    from fastssl.training import config, plan

    numbers = plan.NUM_GPUS
    if gpus is not None:
        if not all(number.isdecimal() and int(number) > 0 for number in gpus.split(",")):
            raise ValueError(f"--gpus must be positive numbers as 8,64, got {gpus!r}")
        numbers = tuple(int(number) for number in gpus.split(","))
    return plan.plan(config.load(*_recipe_and_overrides(words)), numbers)


def _recipe_and_overrides(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    from fastssl.training import config

    if words and "=" not in words[0]:
        return words[0], words[1:]
    return config.DEFAULT_RECIPE, words


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
            "RUN: the folder of a run, for the configuration that it was trained with",
            "--resume: go on with a run that was stopped, or start it if there is none; auto, "
            "which may be left out: from its newest whole checkpoint; or from that in the folder "
            "CHECKPOINT, be it another run's",
            "--profile: train as ever, and write a trace of the steps 4 to 6 that are made and a "
            "table of the ops that cost most into the run's folder, under profile/",
            "--plan: print memory and communication of a step for 1 to 1,024 GPUs, or for those of "
            "--gpus=8,64, and train nothing",
            "--traceback: show where an error came from",
            "",
            "keys, with default, [type] and meaning (a recipe changes the defaults):",
            config.describe(),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
