"""Going on with other ranks, at another ZeRO stage, in another precision: the same state, the same order of data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine_fast.config import dump_config

from . import resume_worker
from .conftest import lines_of, make_config

WORKER = Path(resume_worker.__file__)
PLAIN = {
    "teacher__max_updates": 9,
    "teacher__valid_bleu_sentences": 0,
    "teacher__batch": {"max_tokens": 100, "micro_batches": 4},
}


class Parts:
    """One stage in one directory, a few updates at a time."""

    def __init__(self, root, data_dir):
        self.directory, self._root, self._data = root / "teacher", root, data_dir

    def alone(self, stop, **settings):
        return resume_worker.main(make_config(**{**PLAIN, **settings}), self._data, self.directory, stop)

    def ranks(self, ranks, stop, **settings):
        path = self._root / "config.yaml"
        path.write_text(dump_config(make_config(**{**PLAIN, **settings})))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(WORKER)]
        command += [str(path), str(self._data), str(self.directory), str(stop)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
        return json.loads(line.removeprefix("RESULT "))


@pytest.fixture
def parts(tmp_path, data_dir):
    return Parts(tmp_path, data_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """The same stage on one rank, uninterrupted."""
    parts = Parts(tmp_path_factory.mktemp("whole"), data_dir)
    return parts.alone(99), parts.directory


def agree(parts, seen, whole, kinds=("train", "valid")):
    """Every update got the sentences it would have got, and the losses are those of one rank within rounding."""
    assert [update for part in seen for update in part["sentences"]] == whole[0]["sentences"]
    assert {epoch for epoch, _ in whole[0]["sentences"]} == {0, 1}
    for kind in kinds:
        one, other = lines_of(parts.directory, kind), lines_of(whole[1], kind)
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-5)
        assert [line["update"] for line in one] == [line["update"] for line in other]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_two_ranks_then_one_then_two(parts, whole, stage):
    settings = {"teacher__zero_stage": stage, "teacher__ema_decay": 0.5}
    seen = [parts.ranks(2, 2, **settings), parts.alone(5, **settings), parts.ranks(2, 99, **settings)]
    assert seen[0]["saved"] == seen[1]["loaded"]
    assert seen[1]["saved"] == seen[2]["loaded"]
    assert seen[0]["loaded"] is None
    assert seen[0]["saved"]["step"] == "2.0"
    assert seen[1]["saved"] != seen[1]["loaded"]
    agree(parts, seen, whole, kinds=("train",))


@pytest.mark.parametrize(("before", "after"), [(a, b) for a in range(4) for b in range(4) if a != b])
def test_another_stage(parts, whole, before, after):
    seen = [parts.alone(4, teacher__zero_stage=before), parts.alone(99, teacher__zero_stage=after)]
    assert seen[0]["saved"] == seen[1]["loaded"]
    agree(parts, seen, whole)
