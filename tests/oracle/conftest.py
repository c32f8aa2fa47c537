"""Numbers computed by the authors' own released code, found under ENGINE_FAST_ORACLE (default ../shared/oracle)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine_fast.data.batching import Batch
from engine_fast.models import CMLM, Transformer
from engine_fast.models.fairseq import convert_state, rename_state

ROOT = Path(os.environ.get("ENGINE_FAST_ORACLE", Path(__file__).parents[3] / "shared" / "oracle"))
SETS = sorted(path.parent for path in ROOT.glob("*/meta.json"))
RELATIVE = 1e-10


@dataclass(frozen=True)
class Oracle:
    """One set: a batch, two models, and what the authors' code says of them, all in float64."""

    directory: Path

    def load(self, name: str) -> dict[str, Tensor]:
        with np.load(self.directory / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.directory / "meta.json").read_text())

    @cached_property
    def batch(self) -> Batch:
        arrays = self.load("batch")
        return Batch(arrays["src_tokens"], arrays["target"], torch.arange(len(arrays["target"])))

    @cached_property
    def energies(self) -> dict[str, Tensor]:
        return self.load("energy")

    @cached_property
    def gumbel(self) -> dict[str, Tensor]:
        return self.load("gumbel")

    def student(self) -> CMLM:
        """A fresh copy, in eval mode; dropout is zero."""
        return self._model("student_state", "cmlm")

    def teacher(self) -> Transformer:
        return self._model("teacher_state", "transformer", max_positions=self.meta["max_pos"])

    def _model(self, name: str, kind: str, **switches):
        state = {key: value for key, value in self.load(name).items() if not key.startswith("__extra__")}
        _, model = convert_state(state, kind, heads=self.meta["heads"], dropout=0.0, **switches)
        return model


@pytest.fixture(
    scope="session",
    params=SETS or [pytest.param(None, marks=pytest.mark.skip(reason=f"no oracle sets under {ROOT}"))],
    ids=lambda path: path.name if path else "absent",
)
def oracle(request) -> Oracle:
    return Oracle(request.param)


@pytest.fixture(scope="session")
def agree():
    """agree(ours, theirs): largest deviation at most RELATIVE of the largest value."""

    def check(ours, theirs, what: str = "") -> None:
        ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
        assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
        error = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
        size = theirs.abs().max().item() if theirs.numel() else 0.0
        assert error <= RELATIVE * max(size, 1e-3), f"{what}: differs by {error:.2e}, values up to {size:.2e}"

    return check


@pytest.fixture(scope="session")
def agree_by_name(agree):
    """agree_by_name(model, theirs, value): compares value(parameter) with every tensor under fairseq's names."""

    def check(model, theirs: dict[str, Tensor], value) -> None:
        renamed = rename_state({name: tensor for name, tensor in theirs.items() if "coder." in name})
        own = dict(model.named_parameters(remove_duplicate=False))
        assert {id(parameter) for parameter in own.values()} == {id(own[name]) for name in renamed}
        for name, expected in renamed.items():
            agree(value(own[name]), expected, name)

    return check
