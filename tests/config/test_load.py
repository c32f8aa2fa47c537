"""YAML and --set to a RunConfig: what is read, and one line for each mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_fast.config import RunConfig, dump_config, load_config, parse_config
from engine_fast.errors import ConfigError

SYNTHETIC: dict[str, Any] = {"data": {"synthetic": {}}}


def written(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def overridden(*overrides: str) -> RunConfig:
    """The smallest configuration, with overrides."""
    return load_config("configs/demo.yaml", overrides)


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "x.yaml")
    return str(caught.value)


@pytest.fixture(autouse=True)
def _in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


# ---------------------------------------------------------------- what is read


def test_every_shipped_configuration_loads(root: Path) -> None:
    files = sorted(root.glob("configs/*.yaml"))
    assert root / "configs" / "demo.yaml" in files
    for file in files:
        assert load_config(file).name


def test_what_is_written_is_read_and_the_rest_is_default(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "seed: 7\ndata: {synthetic: {num_words: 9}}\nengine: {optim: {lr: 1e-6}}\n"))
    assert config.seed == 7
    assert config.data.synthetic is not None
    assert config.data.synthetic.num_words == 9
    assert config.data.synthetic.num_train == 30000
    assert config.engine.optim.lr == 1e-6
    assert (config.engine.o1, config.engine.o2) == ("SX", "ST")


def test_dump_and_load_round_trip(tmp_path: Path, root: Path) -> None:
    for file in sorted(root.glob("configs/*.yaml")):
        config = load_config(file)
        assert load_config(written(tmp_path, dump_config(config))) == config


@given(
    lr=st.floats(1e-12, 10.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1),
)
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lr: float, betas: tuple[float, float], name: str
) -> None:
    config = parse_config({**SYNTHETIC, "name": name, "teacher": {"optim": {"lr": lr, "betas": list(betas)}}})
    assert load_config(written(tmp_path_factory.mktemp("round"), dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("engine.optim.lr=1e-5", "engine.optim.lr", 1e-5),
        ("engine.optim.lr=.5E-3", "engine.optim.lr", 5e-4),
        ("seed=12", "seed", 12),
        ("name=inf", "name", "inf"),
        ("name=a=b", "name", "a=b"),
        ("evaluate.iterations=[1, 2]", "evaluate.iterations", [1, 2]),
        ("teacher.max_epochs=null", "teacher.max_epochs", None),
        ("cmlm.from_teacher=true", "cmlm.from_teacher", True),
        (
            "deepspeed.zero_optimization.reduce_bucket_size=1e6",
            "deepspeed",
            {"zero_optimization": {"reduce_bucket_size": 1e6}},
        ),
    ],
)
def test_overrides(override: str, path: str, value: object) -> None:
    node: Any = overridden(override)
    for part in path.split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_the_last_override_wins_and_an_empty_section_can_be_entered(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {synthetic: {}}\nteacher:\n")
    with pytest.raises(ConfigError, match="teacher"):
        load_config(path)
    assert load_config(path, ["teacher.max_updates=5", "teacher.max_updates=6"]).teacher.max_updates == 6


# ---------------------------------------------------------------- mistakes in the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", "not valid YAML"),
        ("- 1\n- 2\n", "holds a list, expected sections such as data:"),
        ("seed: 1\nseed: 2\ndata: {synthetic: {}}\n", "key 'seed' is given twice"),
        ("data: {synthetic: {}, synthetic: {}}\n", "key 'synthetic' is given twice"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("? {a: 1}\n: 1\n", "not valid YAML"),
        ("", "data is missing, and has no default"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_names_itself(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}"):
        load_config(path)


def test_a_file_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read .*configs/"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read .*utf-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "override", ["seed", "=3", ".seed=3", "teacher..lr=3", "seed.x=3", "name=[", "engine.o1=\t- a: :"]
)
def test_an_override_that_cannot_be_used_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {re.escape(repr(override))}"):
        overridden(override)


# ---------------------------------------------------------------- mistakes in keys and values


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    assert refused({**SYNTHETIC, "techer": {}}) == "x.yaml: techer is not a known key. Did you mean 'teacher'?"
    assert "teacher.optim.warmup_update is not a known key. Did you mean 'warmup_updates'?" in refused(
        {**SYNTHETIC, "teacher": {"optim": {"warmup_update": 3}}}
    )
    assert "data.synthetic.num_word is not a known key. Did you mean 'num_words'?" in refused(
        {"data": {"synthetic": {"num_word": 3}}}
    )
    assert "runtime.xyzzy is not a known key. Known here: device, threads" in refused(
        {**SYNTHETIC, "runtime": {"xyzzy": 3}}
    )


def test_every_mistake_gets_its_own_line() -> None:
    lines = refused({**SYNTHETIC, "sed": 1, "engine": {"o1": "STX", "temperature": 0}}).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("x.yaml: ") for line in lines)
    assert any("engine.o1 = 'STX', expected: " in line and "'STL'" in line for line in lines)
    assert any("engine.temperature = 0, expected: Input should be greater than 0" in line for line in lines)


# ---------------------------------------------------------------- fields that must fit each other

FILES = {"source": "a", "target": "b"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {}}, "data: give exactly one of: corpus (a catalog name), train+valid+test (files), synthetic"),
        ({"data": {"corpus": "x", "synthetic": {}}}, "data: give exactly one of"),
        ({"data": {"corpus": "x", "train": FILES, "valid": FILES, "test": FILES}}, "data: give exactly one of"),
        ({"data": {"train": FILES, "valid": FILES}}, "data: train, valid and test are needed together"),
        ({"teacher": {"architecture": {"width": 10, "heads": 4}}}, "heads = 4 does not divide width = 10"),
        ({"engine": {"precision": "bf16", "zero_stage": 0}}, "precision = bf16 needs zero_stage >= 1"),
        ({"cmlm": {"precision": "fp16", "zero_stage": 0}}, "precision = fp16 needs zero_stage >= 1"),
        ({"teacher": {"average_last": 3, "keep_last": 2}}, "average_last = 3 needs keep_last >= 3, got 2"),
        ({"teacher": {"average_last": 2, "ema_decay": 0.9}}, "average_last and ema_decay are two averages"),
        ({"teacher": {"optim": {"betas": [0.9, 1.0]}}}, "each of betas must lie in [0, 1), got (0.9, 1.0)"),
        ({"teacher": {"optim": {"betas": [-0.1, 0.9]}}}, "each of betas must lie in [0, 1)"),
        ({"seed": True}, "seed = True, expected: a number"),
        ({"teacher": {"max_epochs": True}}, "teacher.max_epochs = True, expected: a number"),
        ({"teacher": {"zero_stage": True}}, "teacher.zero_stage = True, expected: a number"),
        (
            {"engine": {"optim": {"lr": float("inf")}}},
            "engine.optim.lr = inf, expected: Input should be a finite number",
        ),
        ({"engine": {"repetition_weight": float("nan")}}, "expected: Input should be a finite number"),
        ({"engine": {"ensemble": [{"path": "x", "weight": float("inf")}]}}, "Input should be a finite number"),
        ({"evaluate": {"iterations": [1, True]}}, "evaluate.iterations = [1, True], expected: a number"),
        ({"teacher": {"optim": {"betas": [False, 0.9]}}}, "teacher.optim.betas = [False, 0.9], expected: a number"),
        ({"evaluate": {"iterations": []}}, "evaluate.iterations = [], expected: List should have at least 1 item"),
        (
            {"teacher": {"architecture": "lstm"}},
            "teacher.architecture = 'lstm', expected: a section, for example teacher.architecture: {kind: transformer}",
        ),
    ],
)
def test_fields_that_do_not_fit_each_other(tree: dict[str, Any], message: str) -> None:
    text = refused({**SYNTHETIC, **tree})
    assert text.startswith("x.yaml: ")
    assert message in text
    assert len(text.splitlines()) == 1


def test_the_same_fields_are_accepted_once_they_fit() -> None:
    config = parse_config(
        {
            "data": {"train": FILES, "valid": FILES, "test": FILES},
            "teacher": {"average_last": 2, "keep_last": 2, "architecture": {"width": 12, "heads": 4}},
            "cmlm": {"precision": "bf16", "ema_decay": 0.9},
            "engine": {"precision": "bf16", "zero_stage": 1, "optim": {"betas": [0.0, 0.999]}},
        }
    )
    assert config.teacher.effective_zero_stage == 0
    assert config.cmlm.effective_zero_stage == 1
    assert config.engine.effective_zero_stage == 1


def test_a_configuration_cannot_be_changed_after_its_checks() -> None:
    config = parse_config(SYNTHETIC)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_each_stage_has_its_own_defaults() -> None:
    config = parse_config(SYNTHETIC)
    teacher, cmlm = config.teacher.architecture, config.cmlm.architecture
    assert (teacher.positions, teacher.activation, teacher.scale_embedding) == ("sinusoidal", "relu", True)
    assert (cmlm.positions, cmlm.activation, cmlm.scale_embedding, cmlm.norm_epsilon) == (
        "learned",
        "gelu",
        False,
        1e-12,
    )


def test_a_dumped_configuration_asks_for_no_architecture_that_nobody_asked_for(tmp_path):
    config = parse_config({"data": {"synthetic": {}}, "cmlm": {"architecture": {"kind": "bilstm"}}})
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert "architecture" not in again.engine.model_fields_set
