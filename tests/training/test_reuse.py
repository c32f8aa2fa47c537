"""What trials of one process share: teachers once, encoder states while there is room, the same bits as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_fast.config import Architecture
from engine_fast.data.prepared import Prepared
from engine_fast.models import Transformer
from engine_fast.training import Reuse, train_cmlm, train_engine, train_teacher
from engine_fast.training.reuse import num_bytes
from tests.recipes.micro import micro_config


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source_BS: Tensor) -> list[Tensor]:
        self.calls += 1
        return [source_BS.float(), source_BS > 0]


def test_equal_sources_of_one_origin_are_encoded_once() -> None:
    reuse, encode = Reuse(), Counting()
    source = torch.tensor([[5, 6, 2]])
    first = reuse.encoded("a", source, encode)
    assert reuse.encoded("a", source.clone(), encode) is first
    assert encode.calls == 1
    reuse.encoded("b", source, encode)  # another teacher
    reuse.encoded("a", torch.tensor([[5], [6], [2]]), encode)  # the same numbers in another shape
    assert encode.calls == 3


def test_what_came_first_stays_when_there_is_no_more_room() -> None:
    source, other = torch.tensor([[5, 6, 2]]), torch.tensor([[7, 6, 2]])
    size = num_bytes(Counting()(source))
    assert size == 3 * 4 + 3
    reuse, encode = Reuse(max_bytes=size), Counting()
    for _ in range(3):
        reuse.encoded("a", source, encode)
        reuse.encoded("a", other, encode)
    assert encode.calls == 1 + 3


def test_bytes_of_what_encoders_return() -> None:
    teacher = Transformer(
        Architecture(width=8, ffn_width=8, heads=2, encoder_layers=1, decoder_layers=1), 20, 20
    ).eval()
    memory = teacher.encode(torch.tensor([[5, 6, 2]]))
    assert num_bytes(memory) == 3 * 8 * 4 + 3
    assert num_bytes({"a": (memory, [memory])}) == 2 * num_bytes(memory)
    assert num_bytes("text") == 0


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a baseline."""
    from engine_fast.data.prepare import prepare

    out, config = tmp_path_factory.mktemp("start"), micro_config(cmlm={"data": "references"})
    prepare(config.data, out / "data", seed=config.seed)
    data = Prepared.open(out / "data")
    train_teacher(config, data, out / "teacher")
    train_cmlm(config, data, data.split("train"), out / "cmlm", valid_corpus=data.split("valid"))
    return out


def weights(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def engine(start: Path, to: Path, reuse: Reuse | None, **settings: Any) -> bytes:
    config, data = micro_config(engine={"data": "references", **settings}), Prepared.open(start / "data")
    train_engine(
        config, data, data.split("train"), to, valid_corpus=data.split("valid"),
        teacher_dir=start / "teacher", cmlm_dir=start / "cmlm", reuse=reuse,
    )  # fmt: skip
    return weights(to)


def test_reuse_changes_no_bit(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = engine(start, tmp_path / "alone", None)
    reuse = Reuse()
    engine(start, tmp_path / "before", reuse, o2="SX")
    assert len(reuse._teachers) == 1
    kept = len(reuse._encoded)
    assert kept > 0
    assert engine(start, tmp_path / "after", reuse) == alone
    assert len(reuse._encoded) == kept, "the second trial met no batch of the first"


def test_a_teacher_with_dropout_is_not_reused(start: Path, tmp_path: Path) -> None:
    reuse = Reuse()
    engine(start, tmp_path, reuse, teacher_dropout=True)
    assert not reuse._teachers
    assert not reuse._encoded


def test_a_stages_own_seed_is_as_good_as_the_runs(start: Path, tmp_path: Path) -> None:
    data = Prepared.open(start / "data")
    found = []
    for name, seed, own in (("run", 5, None), ("stage", 3, 5), ("other", 3, None)):
        config = micro_config(cmlm={"data": "references", "seed": own}).model_copy(update={"seed": seed})
        train_cmlm(config, data, data.split("train"), tmp_path / name, valid_corpus=data.split("valid"))
        found.append(weights(tmp_path / name))
    assert found[0] == found[1] != found[2]
