"""Tables 3, 4 and 6: of one run's systems, from its results and its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from engine_fast.evaluation.findings import Row, row_of
from engine_fast.evaluation.published import ONE_DECIMAL, TABLE3, TABLE4, TABLE6
from engine_fast.evaluation.report import mark_repeats
from engine_fast.evaluation.tables import Direction, PaperTable, grid

STUDENTS = {"cmlm": "CMLM", "engine": "ENGINE"}
NUM_EXAMPLES = 6


def table3(results: dict[str, Any]) -> PaperTable:
    """BLEU of CMLM and ENGINE by number of refinement iterations, each with its own length candidates."""
    systems = results["systems"]
    passes = _passes(systems)
    found = {role: {count: _student(systems, role, count) for count in passes} for role in STUDENTS}
    rows = [
        {
            "system": name,
            "bleu": {str(count): found[role][count]["bleu"] for count in passes},
            "energy": {str(count): found[role][count]["energy"] for count in passes},
            "repetition": {str(count): found[role][count]["repetition"] for count in passes},
        }
        for role, name in STUDENTS.items()
    ]
    gains = {count: found["engine"][count]["bleu"] - found["cmlm"][count]["bleu"] for count in passes}
    first, later = gains[passes[0]], [gains[count] for count in passes[1:]]
    told = ", ".join(f"{gain:+.2f} at {count}" for count, gain in gains.items())
    return PaperTable(
        name="table3",
        title="Table 3: BLEU by number of refinement iterations",
        rows=rows,
        published=_keys_as_text(TABLE3),
        directions=[
            Direction(
                "ENGINE gains most over the CMLM at one pass", passes[0] == 1 and first > max([0.0, *later]),
                f"BLEU of ENGINE less the CMLM's: {told} iterations",
            )
        ],
        ours=grid(
            ["iterations", *map(str, passes)],
            [[name, *(f"{found[role][count]['bleu']:.2f}" for count in passes)] for role, name in STUDENTS.items()],
        ),
        theirs="\n\n".join(
            f"{corpus}, test BLEU:\n\n"
            + grid(
                ["iterations", *map(str, next(iter(figures.values())))],
                [[name, *(f"{bleu:.2f}" for bleu in row.values())] for name, row in figures.items()],
            )
            for corpus, figures in TABLE3.items()
        ),
    )  # fmt: skip


def table4(results: dict[str, Any]) -> PaperTable:
    """BLEU and speed of the teacher, greedy and beam, and of both students with the fewest and the most passes."""
    systems = results["systems"]
    passes = _passes(systems)
    chosen: list[tuple[str, Row]] = []
    for name in ("greedy", "beam"):
        row = row_of(systems, f"teacher-{name}")
        assert row is not None
        chosen.append((f"teacher, {name}" + (f" {row['beam']}" if name == "beam" else ""), row))
    for role, student in STUDENTS.items():
        for count in dict.fromkeys((passes[0], passes[-1])):
            row = _student(systems, role, count)
            chosen.append((f"{student}, {_iterations(count)}", row))
    greedy = chosen[0][1]
    cmlm, engine = (_student(systems, role, passes[0]) for role in STUDENTS)
    rows = [
        {
            "system": name,
            **{key: row.get(key) for key in ("bleu", "bleu_interval", "energy", "sentences_per_second", "latency_ms")},
            "speedup": row["sentences_per_second"] / greedy["sentences_per_second"],
        }
        for name, row in chosen
    ]
    corpora = list(TABLE4)
    names = list(dict.fromkeys(name for figures in TABLE4.values() for name, _ in figures))
    quoted = {corpus: dict(figures) for corpus, figures in TABLE4.items()}
    return PaperTable(
        name="table4",
        title="Table 4: BLEU beside the teacher's and other non-autoregressive systems'",
        rows=rows,
        published={corpus: dict(figures) for corpus, figures in TABLE4.items()},
        directions=[
            Direction(
                f"ENGINE is above the CMLM with {_iterations(passes[0])}",
                engine["bleu"] > cmlm["bleu"],
                f"{engine['bleu']:.2f} against {cmlm['bleu']:.2f} BLEU",
            ),
        ],
        ours=grid(
            ["system", "BLEU", "energy", "sentences/s", "greedy = 1"],
            [
                [
                    row["system"], f"{row['bleu']:.2f}", f"{row['energy']:.2f}", f"{row['sentences_per_second']:.0f}",
                    f"{row['speedup']:.1f}x",
                ]
                for row in rows
            ],
        ),
        theirs="Test BLEU as published, not measured here; the systems below ENGINE are others', with one pass.\n\n"
        + grid(
            ["system", *corpora],
            [[name, *(_published(name, quoted[corpus].get(name)) for corpus in corpora)] for name in names],
        ),
    )  # fmt: skip


def table6(results: dict[str, Any], texts: dict[str, list[str]], references: Sequence[Sequence[str]]) -> PaperTable:
    """Outputs side by side, with each word that repeats the one before it marked.

    Args: texts: "source" and the label of each system -> lines. references: streams of lines.
    """
    systems = results["systems"]
    passes = _passes(systems)[0]
    teacher = row_of(systems, "teacher-beam")
    assert teacher is not None
    shown = {"teacher": teacher, **{name: _student(systems, role, passes) for role, name in STUDENTS.items()}}
    lines = {"source": texts["source"], "reference": references[0]}
    lines |= {name: texts[row["label"]] for name, row in shown.items()}
    repeating = [index for index, line in enumerate(lines["CMLM"]) if has_repeat(line)]
    chosen = evenly_spaced(repeating, NUM_EXAMPLES)
    rows = [{"sentence": index + 1, **{name: column[index] for name, column in lines.items()}} for index in chosen]
    share = {name: row["repetition"] for name, row in shown.items()}
    rule = (
        f"{len(chosen)} sentences, evenly spaced among the {len(repeating)} of {len(lines['source'])} in which the "
        f"CMLM with {_iterations(passes)} repeats a word; a word equal to the one before it is bold."
    )
    blocks = [
        grid([f"sentence {row['sentence']}", ""], [[name, _bold(str(row[name]))] for name in lines], align="---")
        for row in rows
    ]
    return PaperTable(
        name="table6",
        title="Table 6: outputs side by side",
        rows=rows,
        published={"what": TABLE6},
        directions=[
            Direction(
                "ENGINE repeats fewer tokens than the CMLM with as many iterations", share["ENGINE"] < share["CMLM"],
                "share of tokens equal to the one before: "
                + ", ".join(f"{name} {value:.2%}" for name, value in share.items()),
            )
        ],
        ours="\n\n".join([rule, *(blocks or ["There is no such sentence."])]),
        theirs=TABLE6,
    )  # fmt: skip


def has_repeat(line: str) -> bool:
    """Whether a word equals the one before it."""
    return any(a == b for a, b in pairwise(line.split()))


def evenly_spaced(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of them: the middles of so many equal parts."""
    count = min(count, len(items))
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def _bold(line: str) -> str:
    return " ".join(f"**{word}**" if repeated else word for word, repeated in mark_repeats(line))


def _passes(systems: Sequence[Row]) -> list[int]:
    """Numbers of passes measured for both students."""
    both = [{row["iterations"] for row in systems if row["system"] == role} for role in STUDENTS]
    return sorted(both[0] & both[1])


def _student(systems: Sequence[Row], role: str, passes: int) -> Row:
    row = row_of(systems, role, passes)
    assert row is not None
    return row


def _iterations(count: int) -> str:
    return f"{count} iteration{'s' if count > 1 else ''}"


def _published(name: str, bleu: float | None) -> str:
    return "" if bleu is None else format(bleu, ".1f" if name in ONE_DECIMAL else ".2f")


def _keys_as_text(table: dict[str, dict[str, dict[int, float]]]) -> dict[str, Any]:
    return {
        corpus: {name: {str(count): bleu for count, bleu in row.items()} for name, row in figures.items()}
        for corpus, figures in table.items()
    }
