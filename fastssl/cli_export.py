"""`fastssl-export RUN --format FORMAT ...`: a run's model for use elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl.cli_eval import Parser, run_command

NAME = "fastssl-export"
USAGE = f"{NAME} RUN --format FORMAT [FORMAT ...] [--out FOLDER] [--image-size N]"
DESCRIPTION = """\
Write the model of a run of fastssl-train, each format into a folder of its name, with a card:
  safetensors   the encoder, for fastssl.models.<class>.from_pretrained
  checkpoint    every network, head and optimizer state in one file of torch
  transformers  ViTMAE, ViT, Dinov2 (with registers) or Hiera, for their from_pretrained
  onnx          images to features, for any number of images"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    return run_command(build_parser, run, arguments)


def build_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=NAME, usage=USAGE, description=DESCRIPTION, formatter_class=raw)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, with config.yaml and weights.pth")
    add("--format", nargs="+", required=True, metavar="FORMAT", help="one or more of the above")
    add("--out", metavar="FOLDER", help="where the folders go; default: RUN/export")
    add("--image-size", type=int, metavar="N", help="side of images; default: the run's")
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Export, and say where it is."""
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from fastssl.export import export, open_run
    from fastssl.kernels.common.checks import check_int

    if arguments.image_size is not None:
        check_int("image-size", arguments.image_size, 1)
    folder = Path(arguments.run).expanduser()
    out = folder / "export" if arguments.out is None else Path(arguments.out).expanduser()
    trained = open_run(folder, arguments.image_size)
    for name, written in export(trained, arguments.format, out).items():
        print(f"{name}: {written}, see README.md there")


if __name__ == "__main__":
    sys.exit(main())
