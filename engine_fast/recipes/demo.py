"""The demo: the whole recipe on a generated corpus, minutes on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_fast.config import RunConfig, find_config, load_config
from engine_fast.recipes.execute import Say
from engine_fast.recipes.run import run


def demo_config(seed: int | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """configs/demo.yaml with the given seed and `section.key=value` overrides."""
    return load_config(
        find_config(Path("configs/demo.yaml")), [*([] if seed is None else [f"seed={seed}"]), *overrides]
    )


def demo(
    out: Path, *, seed: int | None = None, overrides: Sequence[str] = (), say: Say = print
) -> dict[str, Any] | None:
    """Run the demo under `out`; returns results.json as a tree. Starting again continues."""
    return run(demo_config(seed, overrides), out, say=say)
