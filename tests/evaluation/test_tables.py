"""The paper's tables from made-up figures: cells, directions both ways, the paper's own figures, pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib.image
import pytest

from engine_fast.config import SweepConfig
from engine_fast.config.sweep import trials_of
from engine_fast.evaluation.published import OPERATORS, TABLE2, TABLE3, TABLE4, TABLE5
from engine_fast.evaluation.tables import PaperTable, Spread, grid, markdown
from engine_fast.evaluation.tables_of_runs import evenly_spaced, table3, table4, table6
from engine_fast.evaluation.tables_of_sweeps import Measured, any_sweep, table2, table5
from engine_fast.evaluation.tables_plots import picture

HEADER = {
    "name": "made", "split": "test", "references": {"sentences": 3}, "config": {"seed": 1},
    "signature": {"bleu": "sig"},
}  # fmt: skip


def row(system: str, iterations: int | None = None, **figures: Any) -> dict[str, Any]:
    label = system if iterations is None else f"{system}.i{iterations}"
    return {
        "system": system, "label": label, "iterations": iterations, "beam": 5 if system == "teacher-beam" else None,
        "bleu": 30.0, "energy": 10.0, "repetition": 0.1, "sentences_per_second": 100.0, "oracle_length": False,
        **figures,
    }  # fmt: skip


def of_run(cmlm: tuple[float, float], engine: tuple[float, float]) -> dict[str, Any]:
    """BLEU with 1 and 10 iterations."""
    students = {"cmlm": cmlm, "engine": engine}
    rows = [row("teacher-greedy", bleu=33.0), row("teacher-beam", bleu=34.0, sentences_per_second=25.0)]
    for system, scores in students.items():
        rows += [row(system, count, bleu=score) for count, score in zip((1, 10), scores, strict=True)]
        rows.append(row(system, 1, bleu=1.0))  # a single length: its own length candidates come first
    return {**HEADER, "systems": rows}


def verdicts(table: PaperTable) -> list[bool | None]:
    return [direction.reproduced for direction in table.directions]


def test_table3_says_where_the_gain_is() -> None:
    table = table3(of_run((28.0, 33.0), (32.0, 33.2)))
    assert table.ours.splitlines()[2:] == ["| CMLM | 28.00 | 33.00 |", "| ENGINE | 32.00 | 33.20 |"]
    assert verdicts(table) == [True]
    text = markdown(table, {**HEADER})
    assert (
        "ENGINE gains most over the CMLM at one pass: **reproduced** (BLEU of ENGINE less the CMLM's: +4.00 at 1"
        in text
    )
    assert "| ENGINE | 31.99 | 33.17 |" in text
    assert verdicts(table3(of_run((28.0, 30.0), (29.0, 33.0)))) == [False]
    worse = table3(of_run((28.0, 33.0), (27.0, 31.0)))
    assert "**not reproduced** (BLEU of ENGINE less the CMLM's: -1.00 at 1, -2.00 at 10" in markdown(worse, {**HEADER})


def test_table4_quotes_what_others_published() -> None:
    table = table4(of_run((28.0, 33.0), (32.0, 33.2)))
    assert [line["system"] for line in table.rows] == [
        "teacher, greedy", "teacher, beam 5", "CMLM, 1 iteration", "CMLM, 10 iterations", "ENGINE, 1 iteration",
        "ENGINE, 10 iterations",
    ]  # fmt: skip
    assert table.rows[1]["speedup"] == 0.25
    assert "as published, not measured here" in table.theirs
    assert "| Imputer |  | 31.7 |" in table.theirs
    assert verdicts(table) == [True]
    assert verdicts(table4(of_run((28.0, 33.0), (27.0, 33.2)))) == [False]


def test_table6_chooses_by_rule_and_marks_repeats() -> None:
    results = of_run((28.0, 33.0), (32.0, 33.2))
    for line in results["systems"]:
        line["repetition"] = {"cmlm": 0.3, "engine": 0.0}.get(line["system"], 0.1)
    texts = {
        "source": ["s one", "s two", "s | three"], "teacher-beam": ["a b", "c d", "e f"],
        "cmlm.i1": ["a a", "c d", "e e e"], "engine.i1": ["a b", "c d", "e f f"],
    }  # fmt: skip
    table = table6(results, texts, [["r one", "r two", "r three"]])
    assert [line["sentence"] for line in table.rows] == [1, 3]
    assert "2 sentences, evenly spaced among the 2 of 3" in table.ours
    assert "| CMLM | e **e** **e** |" in table.ours
    assert "| source | s \\| three |" in table.ours
    assert verdicts(table) == [True]
    none = table6(results, {**texts, "cmlm.i1": ["a b", "c d", "e f"]}, [["r one", "r two", "r three"]])
    assert none.rows == []
    assert "There is no such sentence." in none.ours
    assert picture(none).startswith(b"\x89PNG")
    assert evenly_spaced(range(100), 4) == [12, 37, 62, 87]
    assert evenly_spaced([5, 6], 4) == [5, 6]


def operators(energy: Any, seeds: int = 1) -> list[Measured]:
    """Every pair; energy(o1, o2) nats, one more for each further seed."""
    grid = {"engine.o1": list(OPERATORS), "engine.o2": list(OPERATORS), "engine.seed": list(range(seeds))}
    return [
        Measured(
            trial,
            {
                "systems": [
                    row(
                        "engine-oracle", 1, bleu=20.0,
                        energy=float(energy(trial.values["engine.o1"], trial.values["engine.o2"]))
                        + trial.values["engine.seed"],
                    )
                ]
            },
        )
        for trial in trials_of(SweepConfig(grid=grid))
    ]  # fmt: skip


def papers(half: str) -> Any:
    return lambda o1, o2: TABLE2[half]["energy"][o1][OPERATORS.index(o2)]


@pytest.mark.parametrize("half", ["lstm", "transformer"])
def test_the_papers_own_figures_reproduce_table2(half: str) -> None:
    table = table2(operators(papers(half)), half=half)
    assert verdicts(table) == [True, True]
    assert table.title.endswith("seq2seq energy" if half == "lstm" else "transformer energy")


def test_table2_says_what_is_not_reproduced() -> None:
    others = table2(operators(lambda o1, o2: 200 if (o1, o2) == ("SX", "ST") else 100), half="lstm")
    assert verdicts(others) == [False, False]
    assert "energy 200.00, number 25 of 25; the lowest is SX/SX with 100.00" in others.directions[0].evidence
    assert "STL as O2 is clearly worse: **not reproduced** (mean energy over O1: SX 100.00, STL 100.00" in markdown(
        others, {**HEADER}
    )


def test_table2_decides_nothing_without_all_pairs() -> None:
    table = table2(operators(papers("lstm"))[:24], half="lstm")
    assert verdicts(table) == [None, None]
    assert "- STL as O2 is clearly worse: **not decided** (24 of 25 pairs)" in markdown(table, {**HEADER})
    assert [direction["reproduced"] for direction in table.as_json()["directions"]] == [None, None]


def test_table2_marks_what_never_improved() -> None:
    measured = [replace(each, best_update=0 if number in (1, 7) else 40) for number, each in
                enumerate(operators(papers("lstm")))]  # fmt: skip
    text = markdown(table2(measured, half="lstm"), {**HEADER})
    assert "| SX | 55.00 (20.0) | 256.00 (20.0)* | 56.00 (20.0) |" in text
    assert "the network it started from: 2 of 25, marked with an asterisk: SX/STL, STL/SG." in text
    assert "energy as published, its unit is not stated" in text


def test_rows_never_hide_one_another() -> None:
    twice = operators(papers("lstm"))[:2]
    twice[1].results["systems"].append(row("engine-oracle", 4))
    with pytest.raises(AssertionError, match="stands twice"):
        table2(twice, half="lstm")


def test_table2_shows_ranges_over_seeds() -> None:
    table = table2(operators(papers("lstm"), seeds=3), half="lstm")
    assert "| SX | 56.00 [55.00, 57.00] (20.0 [20.0, 20.0]) |" in table.ours
    assert table.rows[0]["energy"] == {"mean": 56.0, "range": [55.0, 57.0], "values": [55.0, 56.0, 57.0]}
    text = markdown(table, {**HEADER, "num_seeds": 3})
    assert "means over 3 seeds" in text
    assert "| GX | 53 (19.8) | 201 (0) | 56 (18.3) | 54 (19.6) | 55 (19.4) |" in text


def trained(energies: tuple[float, float, float], scores: tuple[float, float, float]) -> list[Measured]:
    sweep = SweepConfig.model_validate(
        {"trials": [{"name": n, "set": {}} for n in ("references", "distilled", "engine")]}
    )
    figures = zip(trials_of(sweep), energies, scores, strict=True)
    return [
        Measured(trial, {"systems": [row("engine-oracle", 1, energy=energy, bleu=bleu)]})
        for trial, energy, bleu in figures
    ]


def test_table5_orders_the_ways_to_train() -> None:
    paper = list(TABLE5["IWSLT14 DE-EN"].values())
    table = table5(trained(*zip(*paper, strict=True)))
    assert verdicts(table) == [True, True]
    assert table.ours.splitlines()[-1] == "| ENGINE | 1 | 51.98 | 19.55 |"
    assert verdicts(table5(trained((50.0, 60.0, 10.0), (8.0, 9.0, 10.0)))) == [False, True]
    assert verdicts(table5(trained((60.0, 50.0, 55.0), (9.0, 8.0, 10.0)))) == [False, False]


def test_any_other_sweep_is_sorted_by_energy() -> None:
    sweep = SweepConfig(grid={"engine.optim.lr": [1e-3, 1e-4], "engine.seed": [1, 2]})
    energies = iter((20.0, 22.0, 10.0, 11.0))
    measured = [Measured(trial, {"systems": [row("engine", 1, energy=next(energies))]}) for trial in trials_of(sweep)]
    table = any_sweep(measured)
    assert [line["trial"] for line in table.rows] == ["lr=0.0001", "lr=0.001"]
    assert table.rows[0]["energy"]["range"] == [10.0, 11.0]
    assert table.as_json()["published"] == {}
    assert "## The paper" not in markdown(table, {**HEADER})


def test_other_teachers_are_not_ranked() -> None:
    sweep = SweepConfig(grid={"teacher.optim.lr": [1e-3, 1e-4]})
    energies = iter((20.0, 10.0))
    measured = [Measured(trial, {"systems": [row("engine", 1, energy=next(energies))]}) for trial in trials_of(sweep)]
    table = any_sweep(measured)
    assert [line["trial"] for line in table.rows] == ["lr=0.001", "lr=0.0001"]
    assert "The trials have different teachers" in table.ours


def test_published_figures_are_the_papers() -> None:
    assert TABLE2["lstm"]["energy"]["GX"][0] == 53
    assert TABLE2["transformer"]["bleu"]["STL"] == (25.3, 27.8, 20.0, 30.1, 26.0)
    assert TABLE3["WMT16 RO-EN"]["ENGINE"] == {1: 33.16, 10: 34.04}
    assert dict(TABLE4["IWSLT14 DE-EN"])["CMLM, 1 iteration"] == 28.25
    assert dict(TABLE4["WMT16 RO-EN"])["FlowSeq"] == 30.44
    assert TABLE5["WMT16 RO-EN"]["distilled"] == (205.71, 5.76)
    for half in TABLE2.values():
        assert all(set(half[key]) == set(OPERATORS) for key in ("energy", "bleu"))
        assert all(len(line) == 5 for key in ("energy", "bleu") for line in half[key].values())


def test_every_table_has_its_picture(tmp_path: Any) -> None:
    run = of_run((28.0, 33.0), (32.0, 33.2))
    texts = {"source": ["s"], "teacher-beam": ["a"], "cmlm.i1": ["a a " * 40], "engine.i1": ["a"]}
    tables = [
        table2(operators(papers("lstm"))[:7], half="lstm"), table3(run), table4(run),
        table5(trained((3.0, 2.0, 1.0), (1.0, 2.0, 3.0))), table6(run, texts, [["r"]]),
        any_sweep(operators(papers("lstm"))),
    ]  # fmt: skip
    for table in tables:
        path = tmp_path / f"{table.name}.png"
        path.write_bytes(picture(table))
        height, width, _ = matplotlib.image.imread(path).shape
        assert width > 700, table.name
        assert height > 100, table.name
    assert picture(tables[1]) == picture(tables[1])


def test_cells() -> None:
    assert grid(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
    assert Spread((2.0,)).text(".1f") == "2.0"
    assert Spread((1.0, 2.0, 6.0)).text(".1f") == "3.0 [1.0, 6.0]"
