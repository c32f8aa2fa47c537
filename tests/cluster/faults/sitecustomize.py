"""Stops a rank at a wanted moment, for tests only: Python imports this module where its directory is on PYTHONPATH.

ENGINE_FAST_TEST_FAULT names a directory with plan.json: {"moment", "number", "rank", "action"}. When that rank comes to
the moment for the number-th time since it was started, it writes reached.json and then does what the action says:

    pause   wait for the file `go`: whatever is to happen, somebody outside does it meanwhile
    raise   raise an exception that no code expects
    exit    end with code 7, at once
    nan     let this update's gradient be NaN

A plan strikes once: a process that was started again goes past the place.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class InjectedError(Exception):
    """What the action `raise` raises."""


class _Struck:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def action(self, moment: str, number: int) -> str:
        """The action if this rank is to be struck now; empty otherwise."""
        try:
            plan = json.loads((self._directory / "plan.json").read_text())
        except FileNotFoundError:
            return ""
        here = {"moment": moment, "number": number, "rank": int(os.environ.get("RANK", "0"))}
        if any(plan[key] != value for key, value in here.items()):
            return ""
        try:
            os.close(os.open(self._directory / "struck", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return ""
        fresh = self._directory / "reached.new"
        fresh.write_text(json.dumps({**here, "pid": os.getpid(), "host": socket.gethostname()}))
        fresh.rename(self._directory / "reached.json")
        return str(plan["action"])

    def perform(self, action: str) -> None:
        if action == "pause":
            while not (self._directory / "go").exists():
                time.sleep(0.02)
        elif action == "raise":
            raise InjectedError("injected by the test")
        elif action == "exit":
            os._exit(7)


def _watched(original: Callable[..., Any], moment: str, struck: _Struck, *, after: bool = False) -> Callable[..., Any]:
    """`original`, struck at its beginning, or at its end."""
    calls = itertools.count(1)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        action = struck.action(moment, next(calls)) if not after else ""
        if action == "nan":
            kwargs["num_target_tokens"] = math.nan
        struck.perform(action)
        result = original(*args, **kwargs)
        if after:
            struck.perform(struck.action(moment, next(calls)))
        return result

    return function


def _watch_engine(module: Any, struck: _Struck) -> None:
    """step and load at their beginning; save when this rank's files of DeepSpeed lie in the snapshot."""
    for name in ("backward", "step", "load", "save"):
        setattr(module.Engine, name, _watched(getattr(module.Engine, name), name, struck, after=name == "save"))


def _watch_sealing(module: Any, struck: _Struck) -> None:
    """seal: in the thread that seals a snapshot, before it is flushed."""
    module.sync_and_sum = _watched(module.sync_and_sum, "seal", struck)


WATCHED = {"engine_fast.distributed.engine": _watch_engine, "engine_fast.distributed.sealing": _watch_sealing}


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, struck: _Struck) -> None:
        self._struck, self._busy = struck, False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in WATCHED or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            WATCHED[fullname](module, self._struck)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "ENGINE_FAST_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder(_Struck(Path(os.environ["ENGINE_FAST_TEST_FAULT"]))))
