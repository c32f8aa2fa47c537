"""The report page: what it must hold, that it needs nothing else, and what its paragraphs say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine_fast.errors import CheckpointError
from engine_fast.evaluation.findings import summary, warnings
from engine_fast.evaluation.report import mark_repeats, read_metrics, write_report
from tests.evaluation.fake_run import fake_results, write_fake_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_fake_run(tmp_path_factory.mktemp("report") / "run")
    write_report(run, run / "report.html")
    return (run / "report.html").read_text(encoding="utf-8")


class _Links(HTMLParser):
    """Whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]


def test_page_needs_nothing_else(page: str) -> None:
    parser = _Links()
    parser.feed(page)
    assert [link for link in parser.found if not link.startswith("#")] == []
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(parser.tags)
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_has_every_part(page: str) -> None:
    for part in ("systems", "speed", "energy", "training", "lengths", "examples", "settings"):
        assert f'id="{part}"' in page
    assert page.count("<svg") == 6  # speed, energy, three stages, lengths
    assert "teacher-beam" in page
    assert "engine-oracle" in page
    assert "<td>optim.lr</td><td>0.0005</td>" in page  # every setting
    assert "2.13.0" in page  # every version
    assert "ab" * 32 in page  # hashes
    assert "tok:13a" in page  # signature


def test_repeated_words_are_marked_and_text_is_escaped(page: str) -> None:
    assert "Ball <mark>Ball</mark>" in page
    assert "&lt;b&gt;einen&lt;/b&gt;" in page
    assert "<b>" not in page


def test_colours_come_from_the_page(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert "#0102" not in page  # the stand-ins of the figures


def test_figures_are_reproducible(tmp_path: Path, page: str) -> None:
    run = write_fake_run(tmp_path / "run")
    write_report(run, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_mark_repeats_by_hand() -> None:
    assert mark_repeats("a a b a a a") == [
        ("a", False), ("a", True), ("b", False), ("a", False), ("a", True), ("a", True),
    ]  # fmt: skip


def test_summary_compares_one_pass() -> None:
    first = summary(fake_results())[0]
    assert "With one pass, ENGINE reaches 31.30 BLEU and the CMLM baseline 26.20 (+5.10, p = 0.001)" in first


def _valid(*points: tuple[float, float]) -> list[dict[str, object]]:
    return [
        {"kind": "valid", "update": 100 * number, "energy": energy, "bleu": bleu}
        for number, (energy, bleu) in enumerate(points)
    ]


def test_good_training_draws_no_warning() -> None:
    assert warnings(fake_results(), _valid((60.0, 12.0), (30.0, 20.0), (25.0, 25.0))) == []


def test_energy_that_falls_without_bleu_is_said() -> None:
    said = warnings(fake_results(), _valid((63.6, 12.0), (35.2, 11.9), (27.3, 11.8)))
    assert any("energy fell from 63.6 to 27.3" in line and "never rose above the 12.00" in line for line in said)
    said = warnings(fake_results(), _valid((63.6, 12.0), (35.2, 13.0), (27.3, 11.8)))
    assert any("highest (13.00) at update 100" in line for line in said)


def test_low_energy_without_better_bleu_is_said() -> None:
    said = warnings(fake_results(engine_bleu=20.0), [])
    assert any("here low energy is not good translation" in line for line in said)
    assert not any("here low energy" in line for line in warnings(fake_results(engine_bleu=40.0), []))


def test_systems_below_the_references_are_named() -> None:
    said = warnings(fake_results(engine_energy=20.0), [])
    assert any("references' 21.5 nats" in line and "engine" in line and "cmlm" not in line for line in said)


def test_metrics_survive_a_torn_line_and_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "update": 10, "loss": 2.0}, {"kind": "train", "update": 20, "loss": 1.5}]
    lines.append({"kind": "train", "update": 20, "loss": 1.4})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr', encoding="utf-8")
    assert [line["loss"] for line in read_metrics(path)] == [2.0, 1.4]
    assert read_metrics(tmp_path / "none") == []


def test_missing_metrics_leave_curves_out(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    for stage in ("teacher", "cmlm", "engine"):
        (run / stage / "metrics.jsonl").unlink()
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="training"' not in page
    assert page.count("<svg") == 3


@pytest.mark.parametrize("content", [None, "{", "[]", '{"systems": 3}'])
def test_unreadable_results_are_refused(tmp_path: Path, content: str | None) -> None:
    run = write_fake_run(tmp_path / "run")
    path = run / "evaluate" / "results.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"results\.json: no results can be read"):
        write_report(run, run / "report.html")


def test_known_validity_needs_no_guess_from_energy() -> None:
    results = fake_results(engine_energy=20.0)
    for row in results["systems"]:
        row["valid"] = 0.9
    assert warnings(results, []) == []
