"""Every method with its small recipe, before and after: `python -m benchmarks.methods [METHOD...]`.

A run is `fastssl-train photos_<method> seed=<seed>` in a process of its own, on the bundled
photographs or, judged with few labels, on handwritten digits. Its row is written when it ends, and
a run whose row is there is not made again: the table is resumable run by run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch

from benchmarks.measure import conditions
from fastssl.training import recipes
from fastssl.training.report import read_metrics

PREFIX = "photos_"
RESULTS = Path(__file__).parent / "results" / "methods"
SEEDS = (0, 1, 2)
MEASURES = ("knn", "linear", "rankme", "feature_std")
# What the verdict on a method is about, by data.
JUDGED = {
    "photos": {"knn": "k-NN", "linear": "linear"},
    "digits": {"low_shot_1": "1 label", "low_shot_5": "5 labels"},
}
# Whole digits, which are not themselves in a mirror.
DIGITS = (
    "data=digits",
    "views.region=null",
    "views.flip=0",
    "eval.data=digits",
    "eval.labels_per_class=[1,5]",
)
# Below this share of what it was at first the spread of the features has collapsed.
COLLAPSED = 0.1

Row = dict[str, object]


def recipe_of(method: str) -> str:
    """The small recipe of a method. MAE's is the default recipe."""
    return "photos" if method == "mae" else PREFIX + method


def methods() -> list[str]:
    """Every method that has a small recipe."""
    return sorted(["mae", *(n.removeprefix(PREFIX) for n in recipes.names() if PREFIX in n)])


def run_method(method: str, seed: int, data: str = "photos") -> Row:
    """One run: the measures before and after, speed and memory."""
    measures = dict.fromkeys([*MEASURES, *JUDGED[data]])
    recipe = recipe_of(method)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "fastssl.cli", recipe, f"seed={seed}", f"out={out}"]
        command += ["name=run", "log.tensorboard=false", *(DIGITS if data == "digits" else ())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{method}, seed {seed}: {done.stderr.strip()[-2000:]}")
        train, evals = read_metrics(Path(out) / "run" / "metrics.jsonl")
    return {
        "method": method,
        "data": data,
        "seed": seed,
        "recipe": digest(recipe),
        "steps": train[-1]["step"],
        "before": {name: evals[0][name] for name in measures},
        "after": {name: evals[-1][name] for name in measures},
        "loss": [train[0].get("loss"), train[-1].get("loss")],
        "images_per_s": median(line["images_per_second"] for line in train),
        "peak_memory_mb": train[-1]["peak_memory_mb"],
        "seconds": time.perf_counter() - begin,
        **conditions(torch.device("cpu")),
    }


def digest(recipe: str) -> str:
    """What a run is a function of, beside its seed and the code."""
    return hashlib.sha256(recipes.find(recipe).read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.is_file() else []


def data_of(rows: Sequence[Row]) -> str:
    """What the runs of one file were on."""
    return rows[0]["data"] if rows else "photos"


def is_there(rows: Sequence[Row], method: str, seed: int) -> bool:
    key = (method, seed, digest(recipe_of(method)))
    return any((row["method"], row["seed"], row["recipe"]) == key for row in rows)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(list(rows), indent=1) + "\n")
    os.replace(writing, path)


def is_finite(row: Row) -> bool:
    """Whether every measure before and after is a number."""
    return all(math.isfinite(v) for when in ("before", "after") for v in row[when].values())


def verdict(rows: Sequence[Row]) -> str:
    """What the rows of one method show.

    "rises" where on one of the two measures every seed's gain is above the spread (the standard
    deviation over seeds) of the gains, and not both fall; "collapses" by the features' spread.
    """
    if not all(is_finite(row) for row in rows):
        return "diverges"
    if len(rows) < 2:
        return "one seed only"
    judged = JUDGED[data_of(rows)]
    gains = {m: [row["after"][m] - row["before"][m] for row in rows] for m in judged}
    if any(row["after"]["feature_std"] < COLLAPSED * row["before"]["feature_std"] for row in rows):
        return "collapses"
    if all(mean(gain) < 0 for gain in gains.values()):
        return "falls"
    spread = {m: stdev(gain) for m, gain in gains.items()}
    risen = [m for m, gain in gains.items() if min(gain) > spread[m]]
    return "rises" if risen else "within the spread"


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a method, means over seeds with the standard deviation of the gain."""
    judged = JUDGED[data_of(rows)]
    lines = [
        f"| method | {' | '.join(f'{name} before → after | gain' for name in judged.values())} "
        "| RankMe | images/s | MB | seeds | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for method in sorted({row["method"] for row in rows}):
        all_rows = [row for row in rows if row["method"] == method]
        same = [row for row in all_rows if is_finite(row)]
        if not same:
            lines.append(f"| `{method}` |  |  |  |  |  |  |  | {len(all_rows)} | diverges |")
            continue
        cells = [f"`{method}`"]
        for measure in judged:
            before = [row["before"][measure] for row in same]
            after = [row["after"][measure] for row in same]
            gain = [b - a for a, b in zip(before, after, strict=True)]
            spread = f" ± {stdev(gain):.1f}" if len(gain) > 1 else ""
            cells += [f"{mean(before):.1f} → {mean(after):.1f}", f"{mean(gain):+.1f}{spread}"]
        rank = [mean(row[when]["rankme"] for row in same) for when in ("before", "after")]
        cells += [
            f"{rank[0]:.0f} → {rank[1]:.0f}",
            f"{median(row['images_per_s'] for row in same):.0f}",
            f"{max(row['peak_memory_mb'] for row in same):.0f}",
            str(len(all_rows)),
            verdict(all_rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(files: Iterable[Path]) -> str:
    """For each file a line that states its conditions, then its table."""
    parts = []
    for file in files:
        rows = read(file)
        where = sorted(
            {f"{row['machine']['cpu']}, {row['machine']['threads']} threads" for row in rows}
        )
        torches = sorted({row["versions"]["torch"] for row in rows})
        commits = sorted({row["commit"] for row in rows})
        dates = sorted({row["date"] for row in rows})
        parts.append(
            f"On {data_of(rows)}; {'; '.join(where)}; torch {', '.join(torches)}; commit "
            f"{', '.join(commits)}; {', '.join(dates)}:\n\n{table(rows)}\n"
        )
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("methods", metavar="METHOD", nargs="*", help="default: all with a recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--data", choices=JUDGED, default="photos", help="one for each FILE")
    parser.add_argument("--json", type=Path, default=RESULTS / "local.json", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="print what FILE holds, run nothing")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.methods) - set(methods()))
    if unknown:
        parser.error(f"METHOD must be among {', '.join(methods())}, got {', '.join(unknown)}")
    rows = read(options.json)
    if rows and not options.table and data_of(rows) != options.data:
        parser.error(f"{options.json} holds runs on {data_of(rows)}, got --data {options.data}")
    if options.table:
        print(table(rows))
        return 0
    failed = 0
    # Seed by seed, so that what there is after a while tells something of every method.
    for seed in options.seeds:
        for method in options.methods or methods():
            if is_there(rows, method, seed):
                continue
            try:
                row = run_method(method, seed, options.data)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed += 1
                continue
            rows = [r for r in rows if (r["method"], r["seed"]) != (method, seed)] + [row]
            write(options.json, rows)
            print(table([row]).splitlines()[-1], f"{row['seconds']:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
