"""Results: JSON rows in a file, markdown tables from rows, and the README that shows them."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# What the README shows, between lines that name it.
SECTIONS = ("benchmarks", "profiles", "methods")

Row = dict[str, object]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a file; those of the same case and device are replaced, others stay."""
    kept = read_rows([path]) if path.exists() else []
    new = {_key(row) for row in rows}
    kept = [row for row in kept if _key(row) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    return [row for path in paths for row in json.loads(Path(path).read_text())]


def committed_results(folder: Path | None = None) -> list[Path]:
    """Every file of results in a folder, default RESULTS; local.json is what nobody commits."""
    return sorted(path for path in (folder or RESULTS).glob("*.json") if path.name != "local.json")


def file_name(gpu: str | None) -> str:
    """The file of a machine's results: named after its GPU, local.json without."""
    if gpu is None:
        return "local.json"
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def table(rows: Sequence[Row]) -> str:
    """Markdown: for each set of conditions a line that states them, ops, then whole steps."""
    parts = []
    for conditions in dict.fromkeys(conditions_of(row) for row in rows):
        same = [row for row in rows if conditions_of(row) == conditions]
        ops = [row for row in same if "images_per_s" not in row]
        speeds = [row for row in same if "images_per_s" in row]
        # Those of an op are of images on their way in.
        steps = [row for row in speeds if row["backend"] is None]
        views = [row for row in speeds if row["backend"] is not None]
        parts.append(conditions)
        if steps:
            parts.append(_steps_table(steps))
        if views:
            parts.append(_views_table(views))
        if ops:
            parts.append(_ops_table(ops))
    return "".join(f"{part}\n\n" for part in parts).removesuffix("\n")


def update_readme(section: str, content: str, readme: Path, check: bool = False) -> bool:
    """Put `content` between the README's markers of a section; True if it was there already.

    With `check` nothing is written.
    """
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme} must hold the lines {begin} and {end} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    new = f"{before}{begin}\n{content}{end}{after}"
    if new != text and not check:
        readme.write_text(new)
    return new == text


def _key(row: Row) -> tuple:
    return row["case"], row["device"]


def conditions_of(row: Row) -> str:
    """The line that says where, with what and when a row was measured."""
    machine, versions = row["machine"], row["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{where}; {with_what}; commit {row['commit']}, {row['date']}:"


def _steps_table(rows: Sequence[Row]) -> str:
    rivals = dict.fromkeys(rival for row in rows if (rival := _rival(row)))
    title = " or ".join(rivals) or "rival"
    # On a GPU: a step whose launches are recorded once and replayed.
    has_graphs = any("fastssl graphed" in row["images_per_s"] for row in rows)
    header = (
        f"| training | shape | images/s eager | {title} | ratio | images/s compiled "
        f"| {title} | ratio {'| images/s graphed ' * has_graphs}| share of GEMM rate |"
    )
    lines = [header, "|---|---|--:|--:|--:|--:|--:|--:|" + "--:|" * (1 + has_graphs)]
    for row in rows:
        speed, ratios = row["images_per_s"], row["ratios"]
        cells = [f"`{row['case']}`", f"{row['shape']}, {row['dtype']}"]
        for kind, suffix in (("eager", ""), ("compiled", " compiled")):
            cells += [
                _number(speed.get(f"fastssl{suffix}")),
                _number(speed.get(f"{_rival(row)}{suffix}")),
                _ratio(ratios.get(kind)),
            ]
        if has_graphs:
            cells.append(_number(speed.get("fastssl graphed")))
        best = max(n for name, n in row["roofline"].items() if name.startswith("fastssl"))
        lines.append(_line([*cells, f"{best:.0%}"]))
    return "\n".join(lines)


def _rival(row: Row) -> str | None:
    """Whom a step stands beside: transformers, or code written as published."""
    return next((name for name in row["images_per_s"] if not name.startswith("fastssl")), None)


def _views_table(rows: Sequence[Row]) -> str:
    lines = [
        "| views | shape | backend | images/s | over Pillow and ops per image | over kornia "
        "| over eager formulas |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [f"`{row['case']}`", row["shape"], row["backend"]]
        cells.append(_number(row["images_per_s"]["fastssl"]))
        cells += [_ratio(row["ratios"].get(name)) for name in ("pillow", "kornia", "eager")]
        lines.append(_line(cells))
    return "\n".join(lines)


def _ops_table(rows: Sequence[Row]) -> str:
    header = (
        "| op | shape | backend | p50 ms (p20, p80) | over eager | over torch.compile | over rival "
        "| of roofline | extra MB, eager's |"
    )
    lines = [header, "|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        p20, p50, p80 = (_number(q) for q in row["ms"]["fastssl"])
        extra = [f"{row['peak_extra_bytes'][name] / 1e6:.1f}" for name in ("fastssl", "eager")]
        cells = [
            f"`{row['case']}` {row['direction']}",
            row["shape"],
            row["backend"],
            f"{p50} ({p20}, {p80})",
            *(_ratio(row["ratios"].get(name)) for name in ("eager", "compiled")),
            # Of attention, torch's fused kernel.
            _ratio(row["ratios"].get("rival", row["ratios"].get("4-D"))),
            f"{row['roofline']['fastssl']:.0%}",
            ", ".join(extra),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
