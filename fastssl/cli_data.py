"""`fastssl-data pack | verify | info`: decode a dataset once, and check what was written."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl.cli_eval import Parser, run_command

NAME = "fastssl-data"
USAGE = (
    f"{NAME} pack DATA OUT [--shortest-side N] [--shard-mb N] [--workers N] [--overwrite]\n"
    f"       {NAME} verify OUT\n       {NAME} info OUT"
)
DESCRIPTION = """\
pack     decode every picture of DATA (as data= of fastssl-train) into memory-mapped shards in OUT,
         which data= takes in its place; what is there already is gone on with
verify   read all of OUT and compare it with its checksums
info     what OUT holds"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    return run_command(build_parser, run, arguments)


def build_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=NAME, usage=USAGE, description=DESCRIPTION, formatter_class=raw)
    add = parser.add_argument
    add("action", choices=("pack", "verify", "info"), metavar="ACTION", help="one of the above")
    add("paths", nargs="+", metavar="PATH", help="DATA and OUT of pack, else OUT")
    add("--shortest-side", type=int, metavar="N", help="shrink pictures to it; default: keep all")
    add("--shard-mb", type=int, default=512, metavar="N", help="of one shard, in 2^20 bytes")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode")
    add("--overwrite", action="store_true", help="pack: delete the pack that is there")
    add("--traceback", action="store_true", help="show where an error came from")
    return parser


def run(arguments: argparse.Namespace) -> None:
    wanted = 2 if arguments.action == "pack" else 1
    if len(arguments.paths) != wanted:
        raise ValueError(f"{arguments.action} takes {wanted} paths, got {len(arguments.paths)}")
    out = Path(arguments.paths[-1]).expanduser()
    if arguments.action == "pack":
        _pack(arguments, out)
        return
    from fastssl.data.packed import is_pack

    if not is_pack(out):
        raise ValueError(f"OUT must be a folder of {NAME} pack, {out} is none")
    (_verify if arguments.action == "verify" else _info)(out)


def _pack(arguments: argparse.Namespace, out: Path) -> None:
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from tqdm import tqdm

    from fastssl.data import packed
    from fastssl.data.build import open_pictures
    from fastssl.data.fetch import is_url
    from fastssl.kernels.common.checks import check_int

    if arguments.shortest_side is not None:
        check_int("shortest-side", arguments.shortest_side, 1)
    check_int("shard-mb", arguments.shard_mb, 1)
    check_int("workers", arguments.workers, 0)
    data = arguments.paths[0]
    source = Path(data).expanduser().resolve()
    if source.exists() and (out.resolve() == source or out.resolve() in source.parents):
        raise ValueError(f"OUT must not hold DATA, got {out} and {data}")
    # Shards behind URLs are read one after the other, and need not all be kept.
    pictures = open_pictures(data, arguments.shortest_side, int(is_url(data)))
    names = packed.checksum_of_names(pictures)
    shard_bytes = arguments.shard_mb * 2**20
    options = packed.Options(data, len(pictures), names, arguments.shortest_side, shard_bytes)
    if arguments.overwrite and packed.is_pack(out):
        packed.remove(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tqdm(total=len(pictures), unit=" images", disable=None) as bar:
        try:
            workers = {"num_workers": arguments.workers}
            broken = packed.pack(pictures, out, options, **workers, progress=bar.update)
        except KeyboardInterrupt as error:
            raise OSError("stopped; the same command goes on after the shards there are") from error
    for path, reason in list(broken.items())[:5]:
        print(f"skipped {path}: {reason}")
    _info(out)


def _verify(out: Path) -> None:
    from tqdm import tqdm

    from fastssl.data.packed import Damaged, read_shards, verify

    total = sum(shard.bytes for shard in read_shards(out))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        wrong = verify(out, bar.update)
    if wrong:
        raise Damaged("; ".join(wrong))
    print(f"{out}: {total} bytes are as they were written")


def _info(out: Path) -> None:
    from fastssl.data.packed import read_manifest, read_shards

    options, checksums = read_manifest(out)
    shards = list(read_shards(out))
    number = sum(len(shard.names) for shard in shards)
    broken = sum(len(shard.broken) for shard in shards)
    size = sum(shard.bytes for shard in shards)
    state = "" if checksums is not None else f"; not written to the end ({options.number} pictures)"
    print(
        f"{out}: {number} pictures of {options.data} in {len(shards)} shards, {size / 1e9:.3g} GB, "
        f"{broken} broken ones left out{state}"
    )


if __name__ == "__main__":
    sys.exit(main())
