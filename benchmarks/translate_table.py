"""bench_translate's table in markdown and its figure: BLEU against latency, and against sentences a second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

TITLES = {
    "paper": "The paper's size, random weights, {source_tokens} source and {target_tokens} target tokens",
    "trained": "Trained models on the test set they were evaluated on",
}
COLORS = {"student": "#0b6e4f", "teacher": "#8a5a00", "ctranslate2": "#2b4c9b", "transformers": "#7a3b8f"}
MARKERS = {"fp32": "o", "bf16": "s", "int8": "D", "fp16": "^"}
"""By precision; colours tell the engines apart."""


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
    """Two panels that share BLEU. A family is one system at several precisions: joined by a line, named once, the
    marker tells the precision. Better is up and left in the first panel, up and right in the second."""
    figure = Figure(figsize=(12.5, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    latency = {name: (row["latency_ms"]["p50"], row["bleu"]) for name, row in rows.items() if "latency_ms" in row}
    speed = {name: (row["best"], row["bleu"]) for name, row in rows.items()}
    _panel(left, latency, "milliseconds of a sentence alone, median (logarithmic)")
    _panel(right, speed, "sentences a second, best batch (logarithmic)")
    left.set_ylabel("BLEU")
    used = [precision for precision in MARKERS if any(name.endswith(precision) for name in rows)]
    points = [Line2D([], [], linestyle="", marker=MARKERS[name], color="#444444", label=name) for name in used]
    left.legend(handles=points, frameon=False, loc="center left", fontsize=9)
    figure.canvas.draw()
    for axis, each in ((left, latency), (right, speed)):
        _label(axis, each)
    return figure


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Systems that differ in precision alone: what they are called -> their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, precision = name.rpartition(" ")
        found.setdefault(stem if precision in MARKERS else name, []).append(name)
    return found


def _panel(axis: Axes, points: Mapping[str, tuple[float, float]], label: str) -> None:
    for family, names in families(points).items():
        color = COLORS[family.split()[0]]
        axis.plot(*zip(*(points[name] for name in names), strict=True), color=color, linewidth=0.8, alpha=0.6)
        for name in names:
            axis.plot(*points[name], MARKERS.get(name.split()[-1], "o"), color=color, markersize=6)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.16, y=0.14)


def _label(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names each family at the place nearest to it that no other name and no point takes."""
    place = axis.transData.transform
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (place(point) for point in points.values())]
    for family, names in sorted(families(points).items(), key=lambda item: -max(points[name][1] for name in item[1])):
        ends = sorted(points[name] for name in names)
        middle = ((ends[0][0] * ends[-1][0]) ** 0.5, sum(y for _, y in ends) / len(ends))
        options = [(dx, dy) for dy in (11, -11, 24, -24, 37, -37, 50, -50) for dx in (0, 30, -30, 60, -60, 90, -90)]
        best: tuple[int, Annotation, Bbox] | None = None
        for offset in sorted(options, key=lambda each: abs(each[0]) / 2 + abs(each[1])):
            text = axis.annotate(
                family, middle, offset, textcoords="offset points", ha="center", va="center", fontsize=9,
                color=COLORS[family.split()[0]],
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"} if abs(offset[1]) > 11 else None,
            )  # fmt: skip
            box = text.get_window_extent()
            clashes = sum(box.overlaps(other) for other in taken)
            clashes += not axis.bbox.contains(box.x0, box.y0) or not axis.bbox.contains(box.x1, box.y1)
            if best is None or clashes < best[0]:
                if best is not None:
                    best[1].remove()
                best = clashes, text, box
            else:
                text.remove()
            if not clashes:
                break
        assert best is not None
        taken.append(best[2])
