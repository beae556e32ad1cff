"""`fastssl-embed RUN FOLDER OUT`: the frozen features of every image in a folder, in one file.

Reading them back:

    python -c "
    import json, safetensors
    with safetensors.safe_open('out.safetensors', 'numpy') as file:
        features = file.get_tensor('features')            # [N, D] float32
        paths = json.loads(file.metadata()['paths'])      # N paths relative to the folder
    "
    python -c "
    import pyarrow.parquet
    table = pyarrow.parquet.read_table('out.parquet')     # columns path and feature
    features = table['feature'].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    "
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastssl.cli_eval import Parser, add_encoder_arguments, load_subject, run_command

if TYPE_CHECKING:
    from fastssl.cli_eval import Subject
    from fastssl.distributed import World

NAME = "fastssl-embed"
USAGE = f"{NAME} [RUN | --model NAME --weights FILE] FOLDER OUT.safetensors|OUT.parquet [options]"
DESCRIPTION = """\
Write the frozen features of every image below a folder, by a run of fastssl-train (its folder) or
by released weights. On several GPUs: torchrun --nproc-per-node=8 -m fastssl.cli_embed ..."""
# The library that reads safetensors refuses a longer header.
_LONGEST_HEADER = 100_000_000
# Rows that are written to parquet at a time.
_ROWS = 8192

# (file to write, features [N, D], N paths, metadata)
Writer = Callable[[Path, np.ndarray, list[str], dict[str, str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    return run_command(build_parser, run, arguments)


def build_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=NAME, usage=USAGE, description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="RUN FOLDER OUT", help="see above")
    add_encoder_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Embed the folder and say what was left out."""
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from fastssl import distributed
    from fastssl.evaluation.table import broken_files
    from fastssl.kernels.common.checks import check_int

    names = ["FOLDER", "OUT"] if arguments.model is not None else ["RUN", "FOLDER", "OUT"]
    if len(arguments.words) != len(names):
        raise ValueError(
            f"{' '.join(names)} must be given, got {' '.join(arguments.words) or 'none'}"
        )
    *encoder, folder, out = arguments.words
    check_int("batch-size", arguments.batch_size, 1)
    check_int("num-workers", arguments.num_workers, 0)
    out = Path(out).expanduser()
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"FOLDER must be a folder of images, got {folder}, which is none")
    # Before the work rather than after it.
    write = _writer(out)
    with distributed.session(arguments.device) as world:
        subject = load_subject(arguments, encoder[0] if encoder else None, world)
        shape, skipped = embed(subject, folder, out, write, world, arguments)
        if world.is_main:
            print(f"{out}: features of {shape[0]} images, {shape[1]} numbers each")
            if skipped:
                print(broken_files(skipped))


def embed(
    subject: Subject,
    folder: str,
    out: Path,
    write: Writer,
    world: World,
    arguments: argparse.Namespace,
) -> tuple[tuple[int, int], dict[str, str]]:
    """Write `out`; the shape of the features and {path: reason} of the files left out.

    A batch goes to the disk once it is done, each rank's beside `out`, which all ranks must see.
    """
    from fastssl import distributed
    from fastssl.data.folder import ImageFiles, list_images
    from fastssl.data.labelled import CenterCrop, LabelledImages

    root, files, unreadable = list_images(folder)
    if out.suffix == ".safetensors" and len(json.dumps(json.dumps(files))) > _LONGEST_HEADER:
        raise ValueError(f"OUT must be .parquet for the paths of {len(files)} images, got {out}")
    size = subject.image_size
    size = (size, size) if isinstance(size, int) else size
    images = ImageFiles(root, files)
    images.skipped.update(unreadable)
    dataset = LabelledImages(images, CenterCrop(size), mean=subject.mean, std=subject.std)
    part = out.with_name(f"{out.name}.rank_{world.rank}.writing")
    try:
        rows, dim, skipped = _spool(subject, dataset, part, world, arguments)
        of_ranks = distributed.gather((rows, dim, skipped))
        skipped = {path: reason for of_rank in of_ranks for path, reason in of_rank[2].items()}
        rows = [row for of_rank in of_ranks for row in of_rank[0]]
        dim = max(of_rank[1] for of_rank in of_ranks)
        paths = [files[row] for row in rows]
        distributed.on_main(lambda: _merge(out, write, world.size, paths, dim, str(root), skipped))
    finally:
        part.unlink(missing_ok=True)
    return (len(rows), dim), skipped


def _spool(
    subject: Subject, dataset, part: Path, world: World, arguments: argparse.Namespace
) -> tuple[list[int], int, dict[str, str]]:
    """This rank's features as float32 in the file `part`: its rows of the dataset, D (0 where there
    are none), and the files it could not read."""
    import torch

    from fastssl.data.labelled import rank_requests
    from fastssl.data.loader import Loader

    requests = rank_requests(len(dataset), arguments.batch_size, world.rank, world.size)
    loader = Loader(dataset, requests, num_workers=arguments.num_workers, device=world.device)
    rows: list[int] = []
    dim = 0
    with open(part, "wb") as file, torch.no_grad():
        for batch in loader:
            if len(batch):
                features = subject.encoder(batch.images)
                dim = features.shape[1]
                file.write(np.ascontiguousarray(features.cpu().numpy()).data)
                rows += batch.index.tolist()
    return rows, dim, loader.skipped


def _merge(
    out: Path,
    write: Writer,
    num_ranks: int,
    paths: list[str],
    dim: int,
    root: str,
    skipped: dict[str, str],
) -> None:
    """The parts of all ranks, in the order of the files, as `out`."""
    from fastssl.data import NoReadableImage
    from fastssl.evaluation.table import printable

    if not paths:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:5])
        raise NoReadableImage(f"FOLDER must hold at least one readable image, got none ({reasons})")
    whole = out.with_name(f"{out.name}.features.writing")
    writing = out.with_name(f"{out.name}.writing")
    try:
        with open(whole, "wb") as file:
            for rank in range(num_ranks):
                with open(out.with_name(f"{out.name}.rank_{rank}.writing"), "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        features = np.memmap(whole, np.float32, "r", shape=(len(paths), dim))
        metadata = {"folder": printable(root), "skipped": json.dumps(skipped)}
        write(writing, features, paths, metadata)
        os.replace(writing, out)
    finally:
        whole.unlink(missing_ok=True)
        writing.unlink(missing_ok=True)


def _writer(out: Path) -> Writer:
    """The function that writes files called so; ValueError or ImportError where there is none."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"OUT must be a file in a folder that exists, got {out}")
    if out.suffix == ".safetensors":
        import safetensors.numpy  # noqa: F401 - an error now, if it is missing

        return _write_safetensors
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"writing {out} needs pyarrow ({error}): pip install 'fastssl[parquet]'"
            ) from error
        return _write_parquet
    raise ValueError(f"OUT must end in .safetensors or .parquet, got {out}")


def _write_safetensors(
    file: Path, features: np.ndarray, paths: list[str], metadata: dict[str, str]
) -> None:
    from safetensors.numpy import save_file

    save_file({"features": features}, file, {"paths": json.dumps(paths), **metadata})


def _write_parquet(
    file: Path, features: np.ndarray, paths: list[str], metadata: dict[str, str]
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    columns = {"path": pa.string(), "feature": pa.list_(pa.float32(), features.shape[1])}
    schema = pa.schema(columns, metadata=metadata)
    from fastssl.evaluation.table import printable

    # What is no UTF-8 parquet's strings cannot hold.
    paths = [printable(path) for path in paths]
    with ParquetWriter(file, schema) as writer:
        for start in range(0, len(paths), _ROWS):
            rows = features[start : start + _ROWS]
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
            text = pa.array(paths[start : start + _ROWS], pa.string())
            writer.write_table(pa.Table.from_arrays([text, column], schema=schema))


if __name__ == "__main__":
    sys.exit(main())
