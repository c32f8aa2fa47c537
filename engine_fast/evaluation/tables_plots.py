"""The pictures of the paper's tables: this run's figures on the left or above, the paper's beside them. PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from engine_fast.evaluation.published import OPERATORS, TABLE3, TABLE4, TABLE5
from engine_fast.evaluation.report import mark_repeats
from engine_fast.evaluation.tables import PaperTable

COLORS = {"CMLM": "#b5651d", "ENGINE": "#1f6f8b", "teacher": "#4c4c4c", "others": "#b9b9b9", "repeat": "#f4c95d"}
_MOST_CHARACTERS = 100
_OURS, _THEIRS = "energy, nats", "energy, as published"
"""The paper does not state the unit of its figures."""


def picture(table: PaperTable) -> bytes:
    """The table as a PNG file; the same rows give the same bytes under one version of matplotlib."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = _FIGURES[table.name](table)
        figure.suptitle(table.title, fontsize=11)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


def _table2(table: PaperTable) -> Figure:
    """Heat maps of energy and BLEU."""
    first, second = ([o for o in OPERATORS if any(row[key] == o for row in table.rows)] for key in ("o1", "o2"))
    ours = {(row["o1"], row["o2"]): row for row in table.rows}
    paper = table.published
    theirs = {
        (o1, o2): {key: {"mean": paper[key][o1][place]} for key in ("energy", "bleu")}
        for o1 in OPERATORS
        for place, o2 in enumerate(OPERATORS)
    }
    figure = Figure(figsize=(9.5, 7.6), layout="constrained")
    for line, (what, cells, rows, columns, energy) in enumerate(
        (
            ("this run", ours, first, second, _OURS),
            ("the paper, IWSLT14 DE-EN", theirs, OPERATORS, OPERATORS, _THEIRS),
        )
    ):
        for place, (key, name, form, colors) in enumerate(
            (("energy", energy, ".3g", "viridis_r"), ("bleu", "BLEU", ".1f", "viridis"))
        ):
            axis = figure.add_subplot(2, 2, 2 * line + place + 1)
            values = np.array([[_mean(cells.get((o1, o2)), key) for o2 in columns] for o1 in rows])
            _heat(axis, values, rows, columns, form=form, colors=colors)
            axis.set_title(f"{name}: {what}", fontsize=9)
    return figure


def _table3(table: PaperTable) -> Figure:
    """BLEU against iterations."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    panels: list[tuple[str, dict[str, dict[str, float]]]] = [
        ("this run", {row["system"]: row["bleu"] for row in table.rows}),
        *(
            (f"the paper, {corpus}", {name: {str(k): v for k, v in row.items()} for name, row in figures.items()})
            for corpus, figures in TABLE3.items()
        ),
    ]
    for number, (title, figures) in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), number + 1)
        for name, bleu in figures.items():
            axis.plot(list(map(int, bleu)), list(bleu.values()), marker="o", label=name, color=COLORS[name])
        axis.set_xscale("log")
        axis.set_xticks(list(map(int, next(iter(figures.values())))), labels=list(next(iter(figures.values()))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("iterations")
        axis.set_ylabel("BLEU")
        axis.set_title(title, fontsize=9)
        axis.legend(frameon=False)
    return figure


def _table4(table: PaperTable) -> Figure:
    """BLEU as bars."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = [
        ("this run", [(row["system"], row["bleu"]) for row in table.rows]),
        *((f"published, {corpus}", list(rows)) for corpus, rows in TABLE4.items()),
    ]
    for number, (title, bars) in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), number + 1)
        names = [name for name, _ in bars][::-1]
        values = [value for _, value in bars][::-1]
        _bars(axis, names, values, form=".2f")
        axis.set_xlabel("BLEU")
        axis.set_title(title, fontsize=9)
    return figure


def _table5(table: PaperTable) -> Figure:
    """Energy and BLEU as bars."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    panels: list[tuple[str, dict[str, tuple[float, float]]]] = [
        ("this run", {row["training"]: (row["energy"]["mean"], row["bleu"]["mean"]) for row in table.rows}),
        *((f"the paper, {corpus}", figures) for corpus, figures in TABLE5.items()),
    ]
    for place in range(2):
        for number, (title, figures) in enumerate(panels):
            axis = figure.add_subplot(2, len(panels), place * len(panels) + number + 1)
            names = [{"engine": "ENGINE"}.get(name, name) for name in figures][::-1]
            _bars(axis, names, [pair[place] for pair in figures.values()][::-1], form=".1f")
            axis.set_xlabel("BLEU" if place else f"{_THEIRS if number else _OURS} (lower is better)")
            axis.set_title(title, fontsize=9)
    return figure


def _table6(table: PaperTable) -> Figure:
    """Lines of text in one width, repeated words on a coloured ground."""
    lines: list[tuple[str, str]] = []
    for row in table.rows:
        lines += [(name, str(text)) for name, text in row.items() if name != "sentence"] + [("", "")]
    figure = Figure(figsize=(10.5, 0.6 + 0.19 * max(1, len(lines))), layout="constrained")
    axis = figure.add_subplot()
    axis.set_xlim(0, _MOST_CHARACTERS + 12)
    axis.set_ylim(len(lines), -1)
    axis.axis("off")
    for number, (name, text) in enumerate(lines):
        axis.text(0, number, name, family="monospace", fontsize=7, color=COLORS.get(name, "black"), va="center")
        column = 12
        for word, repeated in mark_repeats(text):
            if column + len(word) > _MOST_CHARACTERS + 12:
                axis.text(column, number, "...", family="monospace", fontsize=7, va="center")
                break
            ground = {"facecolor": COLORS["repeat"], "edgecolor": "none", "pad": 1.0} if repeated else None
            axis.text(column, number, word, family="monospace", fontsize=7, va="center", bbox=ground)
            column += len(word) + 1
    if not lines:
        axis.text(0, -0.5, "no sentence in which the CMLM repeats a word")
    return figure


def _sweep(table: PaperTable) -> Figure:
    """Energy of each trial as a bar, its range as a line."""
    figure = Figure(figsize=(8.5, 1.2 + 0.25 * len(table.rows)), layout="constrained")
    for place, (key, label) in enumerate((("energy", f"{_OURS} (lower is better)"), ("bleu", "BLEU"))):
        axis = figure.add_subplot(1, 2, place + 1)
        names = [f"{row['trial']} {row['system']}" for row in table.rows][::-1]
        spreads = [row[key] for row in table.rows][::-1]
        means = [spread["mean"] for spread in spreads]
        ends = [spread["range"][1] for spread in spreads]
        _bars(axis, names if place == 0 else [""] * len(names), means, form=".2f", ends=ends)
        axis.hlines(range(len(spreads)), [spread["range"][0] for spread in spreads], ends, color="black")
        axis.set_xlabel(label)
    return figure


_FIGURES: dict[str, Callable[[PaperTable], Figure]] = {
    "table2": _table2, "table3": _table3, "table4": _table4, "table5": _table5, "table6": _table6, "sweep": _sweep,
}  # fmt: skip


def _heat(
    axis: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, form: str, colors: str
) -> None:
    """Bright is good: low energy, high BLEU. Missing pairs stay white."""
    image = axis.imshow(values, cmap=colors, aspect="auto")
    shades = image.to_rgba(values)
    axis.set_xticks(range(len(columns)), labels=list(columns))
    axis.set_yticks(range(len(rows)), labels=list(rows))
    axis.set_xlabel("O2")
    axis.set_ylabel("O1")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = shades[y, x, :3].sum() > 1.5
            axis.text(x, y, format(value, form), ha="center", va="center", color="black" if light else "white")


def _bars(
    axis: Axes, names: Sequence[str], values: Sequence[float], *, form: str, ends: Sequence[float] | None = None
) -> None:
    """ends: what the numbers stand behind; default, the bars."""
    colors = [COLORS.get(name.split(",")[0], COLORS["others"]) for name in names]
    places = range(len(values))
    axis.barh(places, values, color=colors)
    for place, value, end in zip(places, values, values if ends is None else ends, strict=True):
        axis.annotate(format(value, form), (end, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, labels=list(names))
    axis.margins(x=0.2)


def _mean(row: dict[str, Any] | None, key: str) -> float:
    return float("nan") if row is None else float(row[key]["mean"])
