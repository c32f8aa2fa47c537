"""The whole recipe at a size of seconds, as a module that tests run in-process and as a process to be killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_fast.config import RunConfig, parse_config

STAGES = ("prepare", "teacher", "distill", "cmlm", "engine", "evaluate", "report")


def micro_config(**sections: dict[str, Any]) -> RunConfig:
    """A corpus of 120 sentences, models of width 16; `sections` are merged over it, one level deep."""
    architecture = {
        "width": 16, "ffn_width": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 32,
        "tie": "all", "norm": "pre",
    }  # fmt: skip
    training = {
        "architecture": architecture,
        "max_updates": 6,
        "batch": {"max_tokens": 400, "max_sentences": 32},
        "optim": {"lr": 1e-3, "warmup_updates": 2},
        "validate_every": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "valid_bleu_sentences": 5,
    }
    tree: dict[str, Any] = {
        "name": "micro",
        "seed": 3,
        "data": {
            "synthetic": {"num_words": 12, "num_train": 120, "num_valid": 10, "num_test": 12},
            "vocabulary": {"size": 64},
            "filters": {"max_tokens": 32, "drop_duplicates": False},
            "pretokenised": True,
            "workers": 1,
        },
        "teacher": training,
        "distill": {"beam": 2, "chunk_sentences": 40},
        "cmlm": training,
        "engine": training,
        "evaluate": {"beam": 2, "iterations": [1, 2], "latency_sentences": 2, "bootstrap_samples": 20},
        "runtime": {"device": "cpu", "tensorboard": False, "min_free_bytes": 0},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            _die()
        return function(*args, **kwargs)

    return wrapped


def _nth(number: int) -> Callable[..., bool]:
    calls = iter(range(1, sys.maxsize))
    return lambda *_args, **_kwargs: next(calls) == number


def arrange_death(stage: str) -> None:
    """Let this process kill itself in the middle of `stage`, once part of its work is on disk."""
    from engine_fast.data import shards
    from engine_fast.decoding import distill
    from engine_fast.evaluation import measure
    from engine_fast.recipes import stages
    from engine_fast.training import metrics

    if stage == "prepare":
        shards.ShardWriter.add = _dying(shards.ShardWriter.add, _nth(50))  # type: ignore[method-assign]
    elif stage == "distill":
        distill._write_chunk = _dying(distill._write_chunk, _nth(2))
    elif stage == "evaluate":
        measure.corpus_bleu = _dying(measure.corpus_bleu, _nth(4))
    elif stage == "evaluate-follower":  # rank 1 in its third system
        third = _nth(3)
        measure.decode_share = _dying(measure.decode_share, lambda *_, world, **__: world.rank == 1 and third())
    elif stage == "report":
        stages.write_report = _dying(stages.write_report, _nth(1))
    else:  # after the checkpoint of update 4, before the one of update 6
        metrics.MetricsLog.write = _dying(  # type: ignore[method-assign]
            metrics.MetricsLog.write,
            lambda log, kind, update, values: log.path.parent.name == stage and update == 5,
        )


def main() -> None:
    """micro.py OUT [STAGE TO DIE IN]"""
    from engine_fast.distributed.runtime import leave
    from engine_fast.recipes.run import run

    out, *doomed = sys.argv[1:]
    for stage in doomed:
        arrange_death(stage)
    run(micro_config(), Path(out), say=lambda line: print(line, flush=True))
    leave(0)  # as the command does: gloo's threads may abort a launched rank on its way out


if __name__ == "__main__":
    main()
