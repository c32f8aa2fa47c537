"""Tables 2 and 5, and the table of any other sweep: of many trials' systems, averaged over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine_fast.config.sweep import Trial, is_seed
from engine_fast.evaluation.published import AS_PUBLISHED, OPERATORS, TABLE2, TABLE5
from engine_fast.evaluation.tables import Direction, PaperTable, Spread, grid

NEAR = 1.1
"""An energy up to this many times the lowest is among the best; one beyond it is clearly worse."""
_TEACHERS_DIFFER = (
    "The trials have different teachers, whose energies must not be compared: they are in the order of the sweep."
)
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
    best_update: int | None = None
    """Of its ENGINE student: the update whose weights were kept; 0 is the network it started from."""


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
    num_unchanged: int
    """Trials whose student never improved on its first validation."""

    def as_json(self) -> dict[str, Any]:
        figures = {"energy": self.energy, "bleu": self.bleu, "repetition": self.repetition}
        spreads = {name: spread.as_json() for name, spread in figures.items()}
        about = {"trial": self.label, "system": self.system, "values": self.values, "unchanged": self.num_unchanged}
        return {**about, **spreads, "num_seeds": self.num_seeds}

    @property
    def num_seeds(self) -> int:
        """Repetitions."""
        return len(self.energy.values)


def groups_of(measured: Sequence[Measured]) -> list[Group]:
    """One for each group of trials and each system that they measured, in order."""
    rows: dict[tuple[str, str], list[tuple[Measured, dict[str, Any]]]] = {}
    for each in measured:
        for row in each.results["systems"]:
            rows.setdefault((each.trial.group, row["label"]), []).append((each, row))
    found = []
    for (label, system), members in rows.items():
        trial = members[0][0].trial
        unchanged = sum(each.best_update == 0 for each, row in members if row["system"].startswith("engine"))
        energy, bleu, repetition = (
            Spread(tuple(row[key] for _, row in members)) for key in ("energy", "bleu", "repetition")
        )
        values = {key: value for key, value in trial.values.items() if not is_seed(key)}
        found.append(Group(label, trial.name, values, system, energy, bleu, repetition, unchanged))
    return found


def table2(measured: Sequence[Measured], *, half: str) -> PaperTable:
    """Energy and BLEU by operators. half: "lstm" (a) or "transformer" (b), the paper's figures to show beside."""
    found = groups_of(measured)
    groups = {(group.values["engine.o1"], group.values["engine.o2"]): group for group in found}
    assert len(groups) == len(found), "a pair of operators stands twice"
    first, second = ([name for name in OPERATORS if any(pair[place] == name for pair in groups)] for place in (0, 1))
    paper = TABLE2[half]
    pairs = {o1: zip(paper["energy"][o1], paper["bleu"][o1], strict=True) for o1 in OPERATORS}

    def cells(o1: str) -> list[str]:
        row = [groups.get((o1, o2)) for o2 in second]
        return [
            "" if group is None
            else f"{group.energy.text('.2f')} ({group.bleu.text('.1f')})" + "*" * (group.num_unchanged > 0)
            for group in row
        ]  # fmt: skip

    return PaperTable(
        name="table2",
        title=f"Table 2: energy (BLEU) by operators, {'seq2seq' if half == 'lstm' else 'transformer'} energy",
        rows=[{"o1": o1, "o2": o2, **group.as_json()} for (o1, o2), group in groups.items()],
        published=paper,
        directions=_directions2(groups),
        ours=grid(["O1 \\ O2", *second], [[o1, *cells(o1)] for o1 in first]) + "\n\n" + _unchanged(groups),
        num_seeds=_num_seeds(found),
        theirs=f"{paper['what']}; {AS_PUBLISHED}.\n\n" + grid(
            ["O1 \\ O2", *OPERATORS],
            [[o1, *(f"{energy} ({bleu})" for energy, bleu in pairs[o1])] for o1 in OPERATORS],
        ),
    )  # fmt: skip


def table5(measured: Sequence[Measured]) -> PaperTable:
    """The tagger trained on references, on distilled data, and by ENGINE: energy and BLEU, oracle lengths."""
    found = groups_of(measured)
    groups = {group.name: group for group in found}
    assert len(groups) == len(found), "a training stands twice"
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
                "in energy ENGINE is better than distilled data, and that better than references (the paper: DE-EN; in "
                "RO-EN distilled data is worst)",
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
            ["training", "seeds", "energy", "BLEU"],
            [
                [_NAMES5[role], str(group.num_seeds), group.energy.text(".2f"), group.bleu.text(".2f")]
                for role, group in ((role, groups[role]) for role in ROLES5)
            ],
        ),
        num_seeds=_num_seeds(found),
        theirs="\n\n".join(
            f"{corpus}, test set, BiLSTM network, oracle lengths; {AS_PUBLISHED}:\n\n"
            + grid(
                ["training", "energy", "BLEU"],
                [[_NAMES5[role], f"{energy:.2f}", f"{bleu:.2f}"] for role, (energy, bleu) in figures.items()],
            )
            for corpus, figures in TABLE5.items()
        ),
    )  # fmt: skip


def any_sweep(measured: Sequence[Measured]) -> PaperTable:
    """Every trial of a sweep that is no table of the paper, lowest energy first; as listed where teachers differ."""
    found = groups_of(measured)
    comparable = len({_teacher(each.trial) for each in measured}) == 1
    groups = sorted(found, key=lambda group: group.energy.mean) if comparable else found
    note = "" if comparable else f"\n\n{_TEACHERS_DIFFER}"
    return PaperTable(
        name="sweep",
        title="Sweep",
        rows=[group.as_json() for group in groups],
        published={},
        directions=[],
        ours=grid(
            ["trial", "system", "seeds", "energy", "BLEU", "repeated"],
            [
                [
                    group.label, group.system, str(group.num_seeds), group.energy.text(".2f"), group.bleu.text(".2f"),
                    group.repetition.text(".2%"),
                ]
                for group in groups
            ],
        )
        + note,
        num_seeds=_num_seeds(found),
        theirs="",
    )  # fmt: skip


def _num_seeds(groups: Sequence[Group]) -> tuple[int, int]:
    counts = [group.num_seeds for group in groups]
    return min(counts), max(counts)


def _teacher(trial: Trial) -> str:
    """What of the teacher the trial sets."""
    settings = {key: value for key, value in trial.values.items() if key.startswith("teacher.")}
    return json.dumps(settings, sort_keys=True)


def _unchanged(groups: dict[tuple[str, str], Group]) -> str:
    pairs = {f"{o1}/{o2}": group for (o1, o2), group in groups.items() if group.num_unchanged}
    told = ", ".join(
        name + (f" ({group.num_unchanged} of {group.num_seeds} seeds)" if group.num_seeds > 1 else "")
        for name, group in pairs.items()
    )
    return (
        "A pair that never improved on its first validation shows the network it started from: "
        f"{len(pairs)} of {len(groups)}" + (f", marked with an asterisk: {told}." if pairs else ".")
    )


def _directions2(groups: dict[tuple[str, str], Group]) -> list[Direction]:
    claims = "SX/ST is among the best pairs", "STL as O2 is clearly worse"
    if len(groups) < len(OPERATORS) ** 2:
        return [Direction(claim, None, f"{len(groups)} of {len(OPERATORS) ** 2} pairs") for claim in claims]
    energy = {pair: group.energy.mean for pair, group in groups.items()}
    best, ours = min(energy, key=lambda pair: energy[pair]), energy["SX", "ST"]
    place = 1 + sum(value < ours for value in energy.values())
    columns = {o2: sum(energy[o1, o2] for o1 in OPERATORS) / len(OPERATORS) for o2 in OPERATORS}
    others = [value for o2, value in columns.items() if o2 != "STL"]
    told = ", ".join(f"{o2} {value:.2f}" for o2, value in columns.items())
    return [
        Direction(
            claims[0],
            ours <= NEAR * energy[best],
            f"energy {ours:.2f}, number {place} of {len(energy)}; the lowest is {best[0]}/{best[1]} with "
            f"{energy[best]:.2f}, and up to {NEAR} times that counts",
        ),
        Direction(
            claims[1],
            columns["STL"] > NEAR * max(others),
            f"mean energy over O1: {told}; more than {NEAR} times each other one counts",
        ),
    ]
