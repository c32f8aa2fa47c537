"""`base:` of a configuration file: another file below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine_fast.config import find_config, load_config
from engine_fast.errors import ConfigError

BELOW = """
name: below
data: {source_language: a, target_language: b, synthetic: {num_words: 9}}
teacher: {architecture: {width: 16, heads: 2}, max_updates: 7}
evaluate: {iterations: [1, 4]}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_lies_over_its_base_key_by_key(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", BELOW)
    above = write(
        tmp_path / "tables" / "above.yaml",
        "base: ../below.yaml\nteacher: {max_updates: 8}\nevaluate: {iterations: [1]}",
    )
    config = load_config(above, ["seed=5"])
    assert (config.name, config.seed, config.teacher.max_updates) == ("below", 5, 8)
    assert config.teacher.architecture.model_dump()["width"] == 16
    assert config.evaluate.iterations == [1]  # a list is a value, and is replaced


def test_another_kind_of_network_replaces_the_one_below(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", BELOW)
    above = write(tmp_path / "above.yaml", "base: below.yaml\nteacher: {architecture: {kind: lstm, dropout: 0.0}}")
    assert load_config(above).teacher.architecture.kind == "lstm"
    same = write(tmp_path / "same.yaml", "base: below.yaml\nteacher: {architecture: {kind: transformer, dropout: 0.5}}")
    assert load_config(same).teacher.architecture.model_dump()["width"] == 16


def test_an_architecture_without_kind_is_merged(tmp_path: Path) -> None:
    lstm = BELOW.replace("width: 16, heads: 2", "kind: lstm, embedding_width: 16")
    write(tmp_path / "below.yaml", lstm)
    above = write(tmp_path / "above.yaml", "base: below.yaml\nteacher: {architecture: {dropout: 0.5}}")
    assert load_config(above).teacher.architecture.model_dump(exclude_unset=True) == {
        "kind": "lstm", "embedding_width": 16, "dropout": 0.5
    }  # fmt: skip


def test_another_kind_by_option_takes_the_old_keys_out(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", BELOW)
    both = ["teacher.architecture.embedding_width=8", "teacher.architecture.kind=lstm"]
    for overrides in (both, both[::-1]):
        architecture = load_config(tmp_path / "below.yaml", overrides).teacher.architecture
        assert architecture.model_dump(exclude_unset=True) == {"kind": "lstm", "embedding_width": 8}
    same = load_config(tmp_path / "below.yaml", ["teacher.architecture.kind=transformer"])
    assert same.teacher.architecture.model_dump()["width"] == 16


def test_the_option_takes_the_place_of_the_key(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", BELOW)
    other = write(tmp_path / "other.yaml", BELOW.replace("below", "other"))
    above = write(tmp_path / "above.yaml", "base: below.yaml\nseed: 4")
    alone = write(tmp_path / "alone.yaml", "seed: 4")
    assert load_config(above, base=other).name == "other"
    assert load_config(alone, base=other).name == "other"


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: two.yaml")
    write(tmp_path / "two.yaml", "base: one.yaml")
    with pytest.raises(ConfigError, match=r"^base: .*one.yaml -> .*two.yaml -> .*one.yaml comes back"):
        load_config(one)
    missing = write(tmp_path / "missing.yaml", "base: nowhere.yaml")
    with pytest.raises(ConfigError, match=r"missing.yaml: its base .*nowhere.yaml: cannot be read"):
        load_config(missing)
    with pytest.raises(ConfigError, match=r"base = \['a', 'b'\], expected the path of one YAML file"):
        load_config(write(tmp_path / "list.yaml", "base: [a, b]"))
    write(tmp_path / "text.yaml", "nothing but text")
    with pytest.raises(ConfigError, match=r"its base .*text.yaml: holds a str, expected sections"):
        load_config(write(tmp_path / "over.yaml", "base: text.yaml"))


def test_shipped_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/demo.yaml", "configs/tables/table3.yaml", "tables/table3.yaml"):
        assert load_config(find_config(Path(name))).data.synthetic is not None
    own = write(tmp_path / "configs" / "demo.yaml", BELOW)
    assert load_config(find_config(Path("configs/demo.yaml"))).name == "below", own
    assert find_config(Path("no/such.yaml")) == Path("no/such.yaml")
