"""The report's figures: SVG that stands inside the page and takes its colours from the page's style.

Matplotlib draws with the stand-in colours of PALETTE; each is then replaced by the CSS variable of its name, so one
figure serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

PALETTE = {"ink": "#010203", "faint": "#010204", "teacher": "#010205", "cmlm": "#010206", "engine": "#010207"}
VARIANTS = {
    "": ("o", "-"), "-rerank": ("s", "--"), "-beam": ("D", "-"), "-greedy": ("o", "-"), "-oracle": ("^", ":"),
}  # fmt: skip

Metrics = Sequence[dict[str, Any]]
"""The lines of a metrics.jsonl."""


def speed_figure(systems: Sequence[dict[str, Any]]) -> str:
    """BLEU against sentences per second; a line joins the passes of one system, each point names its passes."""
    figure, axes = _panels(1, width=7.2, height=3.9)
    (axis,) = axes
    for name, rows in _groups(systems).items():
        role, suffix = _split(name)
        marker, line = VARIANTS[suffix]
        speeds = [row["sentences_per_second"] for row in rows]
        scores = [row["bleu"] for row in rows]
        axis.plot(speeds, scores, marker=marker, linestyle=line, color=PALETTE[role], label=name, markersize=5)
        for row, speed, score in zip(rows, speeds, scores, strict=True):
            if row["iterations"] is not None:
                above = 6 if suffix == "" else -12
                axis.annotate(
                    str(row["iterations"]), (speed, score), (0, above), textcoords="offset points", ha="center",
                    fontsize=8, color=PALETTE[role],
                )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.08, y=0.14)
    axis.set_xlabel("sentences a second, large batch (logarithmic)")
    axis.set_ylabel("BLEU")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(figure, "BLEU against sentences a second")


def energy_figure(systems: Sequence[dict[str, Any]], reference_energy: float) -> str:
    """BLEU against discrete energy, one point a system; the references' own energy is a vertical line."""
    figure, (axis,) = _panels(1, width=7.2, height=3.6)
    for name, rows in _groups(systems).items():
        role, suffix = _split(name)
        marker, line = VARIANTS[suffix]
        axis.plot(
            [row["energy"] for row in rows], [row["bleu"] for row in rows],
            marker=marker, linestyle=line, linewidth=0.9, color=PALETTE[role], label=name, markersize=5,
        )  # fmt: skip
    axis.axvline(reference_energy, color=PALETTE["faint"], linewidth=1, linestyle=":", label="references")
    axis.margins(x=0.08, y=0.12)
    axis.set_xlabel("energy, nats a sentence (lower is likelier under the teacher)")
    axis.set_ylabel("BLEU")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(figure, "BLEU against energy")


def training_figure(stage: str, metrics: Metrics) -> str:
    """One stage: training and dev loss, dev BLEU, dev energies; panels without data are left out."""
    color = PALETTE[stage]
    train = [line for line in metrics if line.get("kind") == "train"]
    valid = [line for line in metrics if line.get("kind") == "valid"]
    panels: list[tuple[str, list[tuple[str, list[tuple[float, float]], str, str]]]] = [
        (
            "loss",
            [("training", _curve(train, "loss"), PALETTE["faint"], "-"), ("dev", _curve(valid, "loss"), color, "-")],
        ),
        ("dev BLEU", [("", _curve(valid, "bleu"), color, "-")]),
        (
            "dev energy, nats a sentence",
            [
                ("discrete", _curve(valid, "energy"), color, "-"),
                ("relaxed", _curve(valid, "relaxed_energy"), color, "--"),
            ],
        ),
    ]
    panels = [(title, lines) for title, lines in panels if any(points for _, points, _, _ in lines)]
    if not panels:
        return ""
    figure, axes = _panels(len(panels), columns=3, width=10.2, height=2.6)
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for label, points, line_color, style in lines:
            if points:
                xs, ys = zip(*points, strict=True)
                marker = "o" if len(points) < 40 and line_color != PALETTE["faint"] else ""
                axis.plot(xs, ys, color=line_color, linestyle=style, marker=marker, markersize=3, label=label)
        axis.set_title(title, fontsize=10, color=PALETTE["ink"], loc="left")
        axis.set_xlabel("updates")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if len([1 for _, points, _, _ in lines if points]) > 1:
            axis.legend(frameon=False, fontsize=8)
    return _svg(figure, f"Training of {stage}")


def length_figure(lengths: dict[str, dict[str, int]], shown: Sequence[tuple[str, str, str]]) -> str:
    """Histogram of lengths in tokens; `shown` holds (key of lengths, legend, palette colour)."""
    figure, (axis,) = _panels(1, width=7.2, height=2.9)
    longest = max(int(length) for key, _, _ in shown for length in lengths[key])
    for key, label, color in shown:
        counts = [lengths[key].get(str(length), 0) for length in range(1, longest + 1)]
        if color == "faint":
            axis.bar(range(1, longest + 1), counts, width=0.9, color=PALETTE[color], alpha=0.45, label=label)
        else:
            axis.step(range(1, longest + 1), counts, where="mid", color=PALETTE[color], label=label)
    axis.set_xlabel("tokens, end symbol included")
    axis.set_ylabel("sentences")
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return _svg(figure, "Lengths")


def _groups(systems: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by system; oracle lengths are left out where there are others, and of length beams all but the first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    known = [row for row in systems if _split(row["system"])[1] in VARIANTS]
    for row in [row for row in known if not row["oracle_length"]] or known:
        rows = groups.setdefault(row["system"], [])
        if not any(other["iterations"] == row["iterations"] for other in rows):
            rows.append(row)
    return groups


def _split(name: str) -> tuple[str, str]:
    role, dash, rest = name.partition("-")
    return role, dash + rest


def _curve(lines: Metrics, key: str) -> list[tuple[float, float]]:
    return [(line["update"], line[key]) for line in lines if line.get(key) is not None]


def _panels(count: int, *, columns: int = 1, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, number + 1) for number in range(count)]
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(visible=True, color=PALETTE["faint"], alpha=0.25, linewidth=0.6)
        axis.tick_params(colors=PALETTE["ink"], labelsize=8, length=3)
        axis.xaxis.label.set_color(PALETTE["ink"])
        axis.yaxis.label.set_color(PALETTE["ink"])
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(PALETTE["faint"])
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    for axis in figure.axes:
        legend = axis.get_legend()
        for label in legend.get_texts() if legend is not None else ():
            label.set_color(PALETTE["ink"])
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(
        r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', rf'<svg role="img" aria-label="{title}" \1', text, count=1
    )
    text = re.sub(r"font: ?([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    for name, color in PALETTE.items():
        text = text.replace(color, f"var(--{name})")
    return text
