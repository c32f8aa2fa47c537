"""What the paper's tables have in common: rows, what the paper prints, which of its directions show here, markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine_fast.evaluation.published import SOURCE


@dataclass(frozen=True, slots=True)
class Direction:
    """Something the paper's figures say, and whether this run's say it too."""

    claim: str
    reproduced: bool | None
    """None: this run's figures cannot decide it."""
    evidence: str
    """The figures that decide it, or what is missing."""

    def line(self) -> str:
        verdict = {True: "reproduced", False: "not reproduced", None: "not decided"}[self.reproduced]
        return f"- {self.claim}: **{verdict}** ({self.evidence})"


@dataclass(frozen=True, slots=True)
class PaperTable:
    """One table of the paper, made from this run's figures."""

    name: str
    """As in the configuration: table3."""
    title: str
    rows: list[dict[str, Any]]
    """This run's figures, as JSON."""
    published: dict[str, Any]
    """The paper's, as JSON; {} where it has none."""
    directions: list[Direction]
    ours: str
    """Markdown of the rows."""
    theirs: str
    """Markdown of the paper's figures."""
    num_seeds: tuple[int, int] = (1, 1)
    """Repetitions of the row that has fewest, and most."""

    def as_json(self) -> dict[str, Any]:
        """What results.json says under `table`."""
        return {
            "name": self.name,
            "title": self.title,
            "rows": self.rows,
            "published": {"source": SOURCE, **self.published} if self.published else {},
            "directions": [asdict(direction) for direction in self.directions],
        }


def markdown(table: PaperTable, results: dict[str, Any]) -> str:
    """table.md: this run's figures, the paper's, and in which directions they agree."""
    config, signature = results["config"], results["signature"]
    parts = [
        f"# {table.title}",
        f"Run `{results['name']}`, {results['split']} split, {results['references']['sentences']} sentences, "
        f"seed {config['seed']}. BLEU: `{signature['bleu']}`. "
        "Energy: discrete, nats a sentence, under the fp32 teacher." + _of_seeds(table.num_seeds),
        "## This run",
        table.ours,
    ]
    if table.published:
        larger = "Its corpora and models are larger: directions are to be compared, not figures."
        parts += ["## The paper", table.theirs, f"Source: {SOURCE}. {larger}"]
    if table.directions:
        parts += ["## Directions", "\n".join(direction.line() for direction in table.directions)]
    return "\n\n".join(parts) + "\n"


def _of_seeds(num_seeds: tuple[int, int]) -> str:
    fewest, most = num_seeds
    if most == 1:
        return ""
    count = str(most) if fewest == most else f"{fewest} to {most}"
    return f" Figures are means over {count} seeds, with the range in brackets."


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "---:") -> str:
    """A markdown table; the first column is text, the others are figures unless `align` says otherwise."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the seeds of one trial."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "range": [min(self.values), max(self.values)], "values": list(self.values)}

    def text(self, form: str) -> str:
        """The mean, and behind it the range if there is one."""
        if len(self.values) == 1:
            return format(self.mean, form)
        return f"{self.mean:{form}} [{min(self.values):{form}}, {max(self.values):{form}}]"
