"""The command line: `python -m benchmarks [list | run | table]`."""

import argparse
import sys
import time
from pathlib import Path

from benchmarks import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the cases (the default)")
    run = commands.add_parser("run", help="run cases, all of them if none is named")
    run.add_argument("cases", metavar="CASE", nargs="*", help="a name, or what stands before a /")
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    run.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="put the rows into this file, or into one named after the machine in this folder",
    )
    run.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run?")
    run.add_argument("--minutes", type=float, metavar="M", help="begin no case after that")
    run.add_argument("--table", action="store_true", help="print the table, beside --json as .md")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    table = commands.add_parser("table", help="print the table of results, or keep the README's")
    table.add_argument("files", type=Path, metavar="FILE", nargs="*", help="default: the committed")
    table.add_argument("--update", action="store_true", help="write the table into README.md")
    table.add_argument("--check", action="store_true", help="fail if README.md shows another table")
    options = parser.parse_args(arguments)
    if options.command == "table":
        return _table(options)
    return _run(options) if options.command == "run" else _list()


def _list() -> int:
    from benchmarks.registry import all_cases

    for case in all_cases():
        print(f"{case.name:<40} {case.direction:<17} {case.shape}")
    return 0


def _run(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.registry import GPU_SCALE, select
    from benchmarks.runner import run_case

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"--device cuda: torch {torch.__version__} sees no NVIDIA GPU", file=sys.stderr)
        return 2
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        cases = select(options.cases, options.quick, GPU_SCALE if device.type == "cuda" else 1)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    file = options.json
    if file is not None and file.is_dir():
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        file = file / report.file_name(gpu)
    rows, begin = [], time.monotonic()
    for case in cases:
        if options.minutes is not None and time.monotonic() - begin > 60 * options.minutes:
            print(f"no number: {case.name}: the {options.minutes:g} minutes are over", flush=True)
            continue
        try:
            row = run_case(case, device, options.quick)
        except Exception as error:
            # The other cases' numbers stand.
            print(f"no number: {case.name}: {error}", file=sys.stderr)
            continue
        rows.append(row)
        print(_summary(row), flush=True)
        if file is not None:
            report.write_rows(file, [row])
    if options.table:
        text = report.table(rows)
        print(text, end="")
        if file is not None:
            file.with_suffix(".md").write_text(text)
    return int(len(rows) < len(cases))


def _summary(row: report.Row) -> str:
    times = ", ".join(f"{name} {q[1]:.3f}" for name, q in row["ms"].items())
    ratios = ", ".join(f"{name} {value:.2f}x" for name, value in row["ratios"].items())
    return f"{row['case']}: p50 ms {times}; ratios {ratios}"


def _table(options: argparse.Namespace) -> int:
    rows = report.read_rows(options.files or report.committed_results())
    if not (options.update or options.check):
        print(report.table(rows), end="")
        return 0
    from benchmarks import methods, profile

    contents = (
        report.table(rows),
        *(kind.tables(report.committed_results(kind.RESULTS)) for kind in (profile, methods)),
    )
    # All are written, whatever the first was.
    same = all(
        [
            report.update_readme(section, content, report.README, options.check)
            for section, content in zip(report.SECTIONS, contents, strict=True)
        ]
    )
    if options.check and not same:
        print("README.md: run `python -m benchmarks table --update`", file=sys.stderr)
    return int(options.check and not same)


if __name__ == "__main__":
    sys.exit(main())
