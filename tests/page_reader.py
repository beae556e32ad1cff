"""Does what a page of the documentation shows: runs its blocks, or compares them with the code.

Commands run as they stand, in the order of their page and in one folder, with these differences:
SHORT is put behind what `fastssl-train` is told, FOLDERS stand in for the folders of a reader, and
what a test machine lacks is compared with the code instead (NOT_RUN).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from fastssl import cli, cli_data, cli_embed, cli_eval, cli_export, info
from fastssl.distributed import World
from fastssl.training import config, loop, recipes, setup

REPOSITORY = Path(__file__).parents[1]

# A step of a few images: what a run does, but not for how long.
SHORT = [
    *("train.steps=1", "train.global_batch_size=4", "train.accumulation=1"),
    *("train.device_batch_size=null", "train.device=cpu", "train.precision=fp32"),
    *("loader.num_workers=0", "eval.max_images=2", "eval.crops=2", "eval.pictures=1"),
    *("log.every=1", "log.tensorboard=false"),
    # The lines of a block are alternatives, some of which have the same name.
    "overwrite=true",
]
# Of a recipe that is no small one.
SMALL = ["train.global_batch_size=2", "model.args.depth=1"]
# What --resume goes on with has made a step already.
LONGER = [*SHORT[1:-1], "train.steps=2"]
# The reader's folders, by those of the test.
FOLDERS = {
    "/any/folder": "images",
    "/data/imagenet/train": "images",
    "/imagenet/train": "images",
    "/labelled/images": "labelled",
    "/shared/runs": "runs",
}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def name(self) -> str | None:
        """Of the file that it shows, if its first line is a comment that says so."""
        first = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return first[1] if first else None


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks, also those inside of lists."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
    return [
        Block(
            page, text.count("\n", 0, m.start()) + 1, m[2], re.sub(f"^{m[1]}", "", m[3], flags=re.M)
        )
        for m in fenced.finditer(text)
    ]


def commands_of(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


class Reader:
    """Does what a page says, from top to bottom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict = {"__name__": "page"}

    def read(self, block: Block) -> None:
        getattr(self, f"read_{block.language or 'session'}", self.read_unknown)(block)

    def read_unknown(self, block: Block) -> None:
        pytest.fail(f"{block}: no rule for a block of {block.language}")

    def read_text(self, block: Block) -> None:
        """Nothing to run: a formula, or what a command prints."""

    def read_python(self, block: Block) -> None:
        exec(compile(block.text, str(block), "exec"), self.names)

    def read_yaml(self, block: Block) -> None:
        file = Path("shown.yaml")
        file.write_text(reachable(block.text))
        config.load(str(file))

    def read_bash(self, block: Block) -> None:
        for line in commands_of(block.text):
            self.command(line)

    def read_session(self, block: Block) -> None:
        """Commands after $ with what they print."""
        said = ""
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            said = self.command(command)
            assert said.strip() == expected.strip(), f"{block}: $ {command}"
        assert said, f"{block}: a block without a language must be of commands after $"

    def command(self, line: str) -> str:
        """What it prints."""
        words = [reachable(word) for word in shlex.split(line, comments=True)]
        with self.monkeypatch.context() as patch:
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                assert not name.startswith("FASTSSL_") or name in read("ENVS.md"), line
                patch.setenv(name, value)
            rule = RULES.get(words[0])
            assert rule is not None, f"no rule for a command like {line}"
            out = io.StringIO()
            with redirect_stdout(out):
                rule(words[1:], patch)
        return out.getvalue()


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def reachable(text: str) -> str:
    """The text with the test's folders for the reader's."""
    for theirs, ours in FOLDERS.items():
        text = re.sub(rf"(?<![\w/.]){theirs}\b", ours, text)
    assert not re.search(r"(?:^|=|data: )/", text), f"{text} is not among FOLDERS"
    return text


def train(words: list[str], patch: pytest.MonkeyPatch) -> None:
    more = LONGER if "--resume" in words else SHORT
    if words[0] in recipes.names() and not words[0].startswith("photos"):
        more = [*more, *SMALL]
    if "--plan" in words or "--help" in words:
        more = []
    assert cli.main([*words, *more]) == 0, words


def main_of(module) -> Callable:
    def run(words: list[str], patch: pytest.MonkeyPatch) -> None:
        assert module.main(words) == 0, words

    return run


def python(words: list[str], patch: pytest.MonkeyPatch) -> None:
    if words == ["-m", "fastssl.info"]:
        print("\n".join(info.lines()))
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words
    else:
        assert (REPOSITORY / words[0]).is_file(), words


def torchrun(words: list[str], patch: pytest.MonkeyPatch) -> None:
    options = get_args_parser().parse_args(words)
    nodes = int(options.nnodes.rpartition(":")[2])  # at most; the default is 1:1
    ranks = nodes * int(options.nproc_per_node)
    assert options.module, words
    module = importlib.import_module(options.training_script)
    arguments = options.training_script_args
    if module is not cli:
        module.build_parser().parse_intermixed_args(arguments)
        return
    world = World(0, ranks, torch.device("cpu"))
    loaded = []
    patch.setattr(loop, "train", lambda config, **_: loaded.append(config))
    assert cli.main(arguments) == 0 and setup.accumulation(loaded[0], world)


def pip(words: list[str], patch: pytest.MonkeyPatch) -> None:
    known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in (word for word in words[1:] if not word.startswith("-")):
        what, extras = re.fullmatch(r"(\.|fastssl)(?:\[(.+)\])?", word).groups()
        assert what and set((extras or "train").split(",")) <= set(known), word


def make(words: list[str], patch: pytest.MonkeyPatch) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", read("Makefile"), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets), words


def sbatch(words: list[str], patch: pytest.MonkeyPatch) -> None:
    script = next(word for word in words if word.endswith(".sh"))
    assert (REPOSITORY / script).is_file(), words


# Compared with the code, and why.
NOT_RUN = {
    "torchrun": torchrun,  # GPUs of several nodes: its options and the configuration are checked
    "pip": pip,  # tests/test_packaging.py installs: the extras are checked
    "make": make,  # sets up an environment: the targets are checked
    "sbatch": sbatch,  # a cluster: the script is there
}
RULES = {
    "fastssl-train": train,
    "fastssl-eval": main_of(cli_eval),
    "fastssl-embed": main_of(cli_embed),
    "fastssl-export": main_of(cli_export),
    "fastssl-data": main_of(cli_data),
    "python": python,
    "export": lambda words, patch: None,
    **NOT_RUN,
}
