"""bench_translate's table in markdown and its figure: BLEU against latency, and against sentences a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

TITLES = {
    "paper": "The paper's size, random weights, {source_tokens} source and {target_tokens} target tokens",
    "trained": "Trained models on the test set they were evaluated on",
}
COLORS = {"student": "#0b6e4f", "teacher": "#8a5a00", "ctranslate2": "#2b4c9b", "transformers": "#7a3b8f"}
MARKERS = {"student": "o", "teacher": "s", "ctranslate2": "D", "transformers": "^"}


def markdown(content: Mapping[str, Any]) -> str:
    """One table per part, the figures that floors judge, and what the columns mean."""
    lines = [f"# Translation, {content['threads']} threads, one process a system", ""]
    for part, rows in content["parts"].items():
        batches = sorted({int(batch) for row in rows.values() for batch in row["throughput"]})
        scored = any("bleu" in row for row in rows.values())
        columns = ["system", *(["BLEU"] if scored else []), "p50 ms", "p95 ms", *(f"batch {b}" for b in batches), "MiB"]
        lines += [f"## {TITLES[part].format(**content['paper'])}", "", "| " + " | ".join(columns) + " |"]
        lines.append("|---" + "|---:" * (len(columns) - 1) + "|")
        for name, row in rows.items():
            cells = [name, *([f"{row['bleu']:.2f}" if "bleu" in row else ""] if scored else [])]
            alone = row.get("latency_ms")
            cells += [f"{alone['p50']:.1f}", f"{alone['p95']:.1f}"] if alone else ["", ""]
            for batch in batches:
                speed = row["throughput"].get(str(batch))
                cells.append("" if speed is None else f"{speed['sentences_per_second']:.1f} +-{speed['spread']:.0%}")
            lines.append("| " + " | ".join([*cells, f"{row['peak_mib']:.0f}"]) + " |")
        lines.append("")
    lines += [
        "p50, p95: milliseconds of a sentence alone. batch: sentences a second, median over rounds, and the spread of "
        "the rounds (largest less smallest, over the median). MiB: peak resident memory of the whole process.",
        "",
        *(f"- {name}: {value:.2f}" for name, value in content["figures"].items()),
        "",
        f"BLEU: {content['signature']}",
        "",
    ]
    return "\n".join(lines)


def write(content: Mapping[str, Any], folder: Path) -> None:
    """translate.md, and translate.png and .svg where models with BLEU took part."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "translate.md").write_text(markdown(content))
    rows = {name: row for name, row in content["parts"].get("trained", {}).items() if "bleu" in row}
    if rows:
        figure = draw(rows)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"translate.{suffix}", dpi=150)


def draw(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Two panels that share BLEU; every point is labelled. Better is up and left in one, up and right in the other."""
    figure = Figure(figsize=(12.5, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    latency = {name: (row["latency_ms"]["p50"], row["bleu"]) for name, row in rows.items() if "latency_ms" in row}
    speed = {name: (row["best"], row["bleu"]) for name, row in rows.items()}
    _panel(left, latency, "milliseconds of a sentence alone, median (logarithmic)")
    _panel(right, speed, "sentences a second, best batch (logarithmic)")
    left.set_ylabel("BLEU")
    return figure


def _panel(axis: Axes, points: Mapping[str, tuple[float, float]], label: str) -> None:
    axis.set_xscale("log")
    for name, (x, y) in points.items():
        kind = name.split()[0]
        axis.plot(x, y, MARKERS[kind], color=COLORS[kind], markersize=7)
    axis.set_xlabel(label)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.3, y=0.12)
    _label(axis, points)


def _label(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Each name beside its point; where names would cover each other they are moved apart and joined by a line.

    Labels stand in two columns, left of the points in the left half and right of the others, spread in height.
    """
    axis.figure.canvas.draw_idle()
    low, high = axis.get_ylim()
    step = (high - low) * 0.036
    xs = sorted(x for x, _ in points.values())
    middle = (xs[0] * xs[-1]) ** 0.5
    for side in ("left", "right"):
        names = [name for name, (x, _) in points.items() if (x < middle) == (side == "left")]
        names.sort(key=lambda name: points[name][1])
        heights = spread([points[name][1] for name in names], step)
        for name, height in zip(names, heights, strict=True):
            x, y = points[name]
            factor = 1 / 1.12 if side == "left" else 1.12
            axis.annotate(
                name, (x, y), (x * factor, height), va="center", ha="right" if side == "left" else "left", fontsize=8,
                color=COLORS[name.split()[0]], arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"},
            )  # fmt: skip


def spread(heights: list[float], step: float) -> list[float]:
    """The ascending heights moved apart, so that neighbours differ by `step` at least; their mean stays near."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + step) if moved else height)
    shift = sum(a - b for a, b in zip(moved, heights, strict=True)) / max(1, len(moved))
    return [height - shift for height in moved]
