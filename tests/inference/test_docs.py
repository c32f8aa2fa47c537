"""docs/translate.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine_fast.inference.load import load


def test_the_example_runs(root: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [block] = re.findall(
        r"```python\n(.*?)```", (root / "docs" / "translate.md").read_text(encoding="utf-8"), re.DOTALL
    )
    sentences = re.findall(r'"([A-Z][^"]+\.)"', block)
    code = block.replace('"runs/m30k/engine/model"', repr(str(student)))
    assert str(student) in code
    assert len(code.strip().splitlines()) <= 5
    with pytest.warns(UserWarning, match="unknown to the vocabulary"):  # the tiny model knows seven English words
        exec(compile(code, "docs/translate.md", "exec"), {})  # noqa: S102 - our own page
    with pytest.warns(UserWarning, match="unknown to the vocabulary"):
        expected = load(student).translate(sentences)
    assert capsys.readouterr().out.splitlines() == expected
    assert len(expected) == 2
