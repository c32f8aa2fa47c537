"""Tables 2 and 5, and the table of any other sweep: of many trials' systems, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine_fast.config.sweep import Trial, is_seed
from engine_fast.evaluation.published import OPERATORS, TABLE2, TABLE5
from engine_fast.evaluation.tables import Direction, PaperTable, Spread, grid

NEAR = 1.1
"""An energy up to this many times the lowest is among the best; one beyond it is clearly worse."""
ROLES5 = ("references", "distilled", "engine")
_NAMES5 = {
    "references": "baseline (references)", "distilled": "distilled", "engine": "ENGINE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """A trial and what its evaluation found."""

    trial: Trial
    results: dict[str, Any]
    """Its results.json."""


@dataclass(frozen=True, slots=True)
class Group:
    """The trials that differ in seeds alone, and one of their systems."""

    label: str
    name: str
    values: dict[str, Any]
    """section.key -> value, without seeds."""
    system: str
    """Label of the system."""
    energy: Spread
    bleu: Spread
    repetition: Spread

    def as_json(self) -> dict[str, Any]:
        figures = {"energy": self.energy, "bleu": self.bleu, "repetition": self.repetition}
        spreads = {name: spread.as_json() for name, spread in figures.items()}
        return {"trial": self.label, "system": self.system, "values": self.values, **spreads}


def groups_of(measured: Sequence[Measured]) -> list[Group]:
    """One for each group of trials and each system that they measured, in order."""
    rows: dict[tuple[str, str], list[tuple[Trial, dict[str, Any]]]] = {}
    for each in measured:
        for row in each.results["systems"]:
            rows.setdefault((each.trial.group, row["label"]), []).append((each.trial, row))
    found = []
    for (label, system), members in rows.items():
        trial = members[0][0]
        energy, bleu, repetition = (
            Spread(tuple(row[key] for _, row in members)) for key in ("energy", "bleu", "repetition")
        )
        values = {key: value for key, value in trial.values.items() if not is_seed(key)}
        found.append(Group(label, trial.name, values, system, energy, bleu, repetition))
    return found


def table2(measured: Sequence[Measured], *, half: str) -> PaperTable:
    """Energy and BLEU by operators. half: "lstm" (a) or "transformer" (b), the paper's figures to show beside."""
    groups = {(group.values["engine.o1"], group.values["engine.o2"]): group for group in groups_of(measured)}
    first, second = ([name for name in OPERATORS if any(pair[place] == name for pair in groups)] for place in (0, 1))
    paper = TABLE2[half]
    pairs = {o1: zip(paper["energy"][o1], paper["bleu"][o1], strict=True) for o1 in OPERATORS}

    def cells(o1: str) -> list[str]:
        row = [groups.get((o1, o2)) for o2 in second]
        return ["" if group is None else f"{group.energy.text('.2f')} ({group.bleu.text('.1f')})" for group in row]

    return PaperTable(
        name="table2",
        title=f"Table 2: energy (BLEU) by operators, {'seq2seq' if half == 'lstm' else 'transformer'} energy",
        rows=[{"o1": o1, "o2": o2, **group.as_json()} for (o1, o2), group in groups.items()],
        published=paper,
        directions=_directions2(groups, first, second),
        ours=grid(["O1 \\ O2", *second], [[o1, *cells(o1)] for o1 in first]),
        theirs=paper["what"] + ".\n\n" + grid(
            ["O1 \\ O2", *OPERATORS],
            [[o1, *(f"{energy} ({bleu})" for energy, bleu in pairs[o1])] for o1 in OPERATORS],
        ),
    )  # fmt: skip


def table5(measured: Sequence[Measured]) -> PaperTable:
    """The tagger trained on references, on distilled data, and by ENGINE: energy and BLEU, oracle lengths."""
    groups = {group.name: group for group in groups_of(measured)}
    energies, scores = ([getattr(groups[role], key).mean for role in ROLES5] for key in ("energy", "bleu"))
    return PaperTable(
        name="table5",
        title="Table 5: the inference network trained on references, on distilled data, and by ENGINE",
        rows=[{"training": role, **groups[role].as_json()} for role in ROLES5],
        published={
            corpus: {role: {"energy": energy, "bleu": bleu} for role, (energy, bleu) in figures.items()}
            for corpus, figures in TABLE5.items()
        },
        directions=[
            Direction(
                "in energy ENGINE is better than distilled data, and that better than references",
                energies[0] > energies[1] > energies[2],
                ", ".join(f"{_NAMES5[role]} {energy:.2f}" for role, energy in zip(ROLES5, energies, strict=True))
                + " nats a sentence",
            ),
            Direction(
                "in BLEU likewise (the paper: DE-EN; in RO-EN distilled data is worst)",
                scores[0] < scores[1] < scores[2],
                ", ".join(f"{_NAMES5[role]} {bleu:.2f}" for role, bleu in zip(ROLES5, scores, strict=True)),
            ),
        ],
        ours=grid(
            ["training", "energy", "BLEU"],
            [[_NAMES5[role], groups[role].energy.text(".2f"), groups[role].bleu.text(".2f")] for role in ROLES5],
        ),
        theirs="\n\n".join(
            f"{corpus}, test set, BiLSTM network, oracle lengths:\n\n"
            + grid(
                ["training", "energy", "BLEU"],
                [[_NAMES5[role], f"{energy:.2f}", f"{bleu:.2f}"] for role, (energy, bleu) in figures.items()],
            )
            for corpus, figures in TABLE5.items()
        ),
    )  # fmt: skip


def any_sweep(measured: Sequence[Measured]) -> PaperTable:
    """Every trial of a sweep that is no table of the paper, lowest energy first."""
    groups = sorted(groups_of(measured), key=lambda group: group.energy.mean)
    return PaperTable(
        name="sweep",
        title="Sweep",
        rows=[group.as_json() for group in groups],
        published={},
        directions=[],
        ours=grid(
            ["trial", "system", "energy", "BLEU", "repeated"],
            [
                [
                    group.label, group.system, group.energy.text(".2f"), group.bleu.text(".2f"),
                    group.repetition.text(".2%"),
                ]
                for group in groups
            ],
        ),
        theirs="",
    )  # fmt: skip


def _directions2(groups: dict[tuple[str, str], Group], first: list[str], second: list[str]) -> list[Direction]:
    energy = {pair: group.energy.mean for pair, group in groups.items()}
    found = []
    if ("SX", "ST") in energy:
        best = min(energy, key=lambda pair: energy[pair])
        ours = energy["SX", "ST"]
        place = 1 + sum(value < ours for value in energy.values())
        found.append(
            Direction(
                "SX/ST is among the best pairs",
                ours <= NEAR * energy[best],
                f"energy {ours:.2f}, number {place} of {len(energy)}; the lowest is {best[0]}/{best[1]} with "
                f"{energy[best]:.2f}, and up to {NEAR} times that counts",
            )
        )
    columns = {
        o2: sum(values) / len(values)
        for o2 in second
        if (values := [energy[o1, o2] for o1 in first if (o1, o2) in energy])
    }
    others = [value for o2, value in columns.items() if o2 != "STL"]
    if "STL" in columns and others:
        told = ", ".join(f"{o2} {value:.2f}" for o2, value in columns.items())
        found.append(
            Direction(
                "STL as O2 is clearly worse",
                columns["STL"] > NEAR * max(others),
                f"mean energy over O1: {told}; more than {NEAR} times each other one counts",
            )
        )
    return found
