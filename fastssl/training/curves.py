"""The curves of a run as one SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

# A longer curve is thinned: more points would not be seen, and take time to draw.
_MAX_POINTS = 400
# Points of a longer one are not marked.
_MAX_MARKED = 50
# Inches of a row of panels, and of what lies above and below all of them. Placed by hand, for
# matplotlib takes three times as long where it is to find a layout.
_ROW, _EDGE = 3.0, 0.5
# Links and dates that matplotlib would put into the SVG.
_METADATA = ("Date", "Creator", "Format", "Type")
# Title, and the series: kind of line, key, label.
_PANELS = (
    ("loss", (("train", "loss", ""),)),
    (
        "accuracy on held-out images, %",
        (("eval", "knn", "k-NN"), ("eval", "linear", "linear probe")),
    ),
    ("images/s", (("train", "images_per_second", ""),)),
    ("learning rate", (("train", "lr", ""),)),
    ("norm of the gradient", (("train", "grad_norm", ""),)),
    ("RankMe", (("eval", "rankme", "frozen features"), ("train", "rankme", "the loss's features"))),
    ("MFU", (("train", "mfu", ""),)),
)


def draw(train: list[dict], evals: list[dict]) -> str:
    """An <svg> with a panel for each quantity that some line has; "" where none has."""
    lines = {"train": train, "eval": evals}
    panels = []
    for title, series in _PANELS:
        drawn = [
            (kind, key, label, points)
            for kind, key, label in series
            if (points := _points(lines[kind], key))
        ]
        if drawn:
            panels.append((title, drawn))
    return _svg(panels) if panels else ""


def _points(lines: Sequence[dict], key: str) -> list[tuple[int, float]]:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if not any(math.isfinite(value) for _, value in points):
        return []
    every = -(-len(points) // _MAX_POINTS)
    # From the end, so that the newest is there.
    return points[::-1][::every][::-1]


def _svg(panels: list[tuple[str, list]]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    height = _ROW * rows
    figure = Figure(figsize=(10, height))
    edge = _EDGE / height
    figure.subplots_adjust(
        left=0.06, right=0.98, bottom=edge, top=1 - edge, wspace=0.16, hspace=0.45
    )
    # Text stays text, and the identifiers do not change from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastssl"}):
        for i, (title, series) in enumerate(panels):
            axes = figure.add_subplot(rows, 2, i + 1)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
            for kind, key, label, points in series:
                # The series is named in the SVG, to be found again.
                marker = "." if len(points) <= _MAX_MARKED else ""
                name = f"{kind}-{key}"
                axes.plot(*zip(*points, strict=True), marker=marker, label=label, gid=name)
            if any(label for _, _, label, _ in series):
                axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
