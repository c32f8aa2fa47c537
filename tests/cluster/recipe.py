"""The recipe of the fault matrix: stages of seconds, ENGINE at ZeRO-3 beside a bf16 teacher, checkpoints often.

python -m tests.cluster.recipe CONFIG OUT           every stage before ENGINE, so that a case runs ENGINE alone
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from engine_fast.config import RunConfig, dump_config, load_config
from tests.recipes.micro import micro_config

UPDATES, EVERY = 8, 2
"""Of the ENGINE stage: how many, and between checkpoints."""
BEFORE = ("prepare", "teacher", "distill", "cmlm")
"""Stages whose results ENGINE starts from, where the run has them."""


def matrix_config() -> RunConfig:
    """tests/recipes/micro.py without distillation, and with an ENGINE stage as a cluster would have it."""
    plain: dict[str, Any] = micro_config().cmlm.model_dump(exclude_unset=True)
    small = {"num_train": 60, "num_valid": 6, "num_test": 6, "num_words": 12}
    return micro_config(
        data={
            "synthetic": small, "vocabulary": {"size": 48}, "filters": {"max_tokens": 32, "drop_duplicates": False},
            "pretokenised": True, "workers": 1,
        },
        cmlm={**plain, "data": "references"},
        engine={
            **plain, "data": "references", "zero_stage": 3, "teacher_precision": "bf16",
            "batch": {**plain["batch"], "micro_batches": 2},  # one for each of two ranks, or both for a rank alone
            "max_updates": UPDATES, "checkpoint_every": EVERY, "validate_every": UPDATES // 2,
            "valid_bleu_sentences": 0,
        },
        evaluate={
            "beam": 1, "iterations": [1], "latency_sentences": 0, "bootstrap_samples": 0, "oracle_lengths": False,
            "rerank": False,
        },
    )  # fmt: skip


def write_config(path: Path) -> Path:
    path.write_text(dump_config(matrix_config()), encoding="utf-8")
    return path


def copy_base(base: Path, out: Path) -> None:
    """A run in which ENGINE is next."""
    out.mkdir(parents=True)
    for stage in BEFORE:
        if (base / stage).is_dir():
            shutil.copytree(base / stage, out / stage)


def main() -> None:
    from engine_fast.distributed import start
    from engine_fast.recipes.execute import run_graph
    from engine_fast.recipes.stages import build_stages

    config, out = load_config(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2])
    world = start(config.runtime)
    stages = [stage for stage in build_stages(config, out, world=world, say=print) if stage.name in BEFORE]
    run_graph(stages, out, world=world, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
