"""What is shown where there is no terminal."""

from engine_fast.training.progress import Reporter

VALUES = {"loss": 1.25, "energy": 9.5, "lr": 1e-4, "tokens_per_second": 12345.6, "epoch": 0}


def test_plain_lines_now_and_then(capsys):
    reporter = Reporter("engine", total=100, every=3600)
    reporter.start_at(40)
    reporter.show(50, VALUES)
    reporter.show(60, VALUES)
    reporter.say("valid at 60")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("engine 50/100  loss 1.250  energy 9.50  lr 1.00e-04  12,346 tokens/s  00:00:0")
    assert lines[1] == "engine: valid at 60"


def test_other_ranks_are_silent(capsys):
    reporter = Reporter("engine", total=100, silent=True)
    reporter.start_at(0)
    reporter.advance(10)
    reporter.show(10, VALUES)
    reporter.say("hello")
    reporter.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    reporter = Reporter("teacher", total=10)
    reporter.start_at(0)
    reporter.show(5, VALUES)
    reporter.close()
    said = capsys.readouterr().err
    assert "5/10" in said
    assert "12,346 tokens/s" in said
