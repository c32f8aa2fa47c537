"""DeepSpeed's universal form of a checkpoint: every parameter's float32 weight and moments, whole, a file for each.

    zero/<parameter>/fp32.pt  exp_avg.pt  exp_avg_sq.pt      tensors, or {"param": tensor}
    zero/<parameter>/step.pt  or  zero/optimizer_state.pt    Adam's step

It says nothing of ranks or stages. DeepSpeed's own loader ties a form to its stage and, at stage 3, lets all groups
share one step counter: reading is ours.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine_fast.distributed.master import QUANTITIES, MasterState, Quantity

_FORM = "form"
"""Below the target, since DeepSpeed leaves a `latest_universal` beside its output."""


def note() -> dict[str, Any]:
    """What DeepSpeed's converter wants to find among a checkpoint's client states."""
    from deepspeed.checkpoint import constants

    return {
        constants.UNIVERSAL_CHECKPOINT_INFO: {
            constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
        }
    }


def convert(source: Path, target: Path, *, stage: int, names: list[str]) -> None:
    """Write the universal form of DeepSpeed's files in `source`, saved at `stage`. In this process, on one core.

    `names`: the trained parameters, in the optimizer's order; a stage-0 file does not have them.
    """
    if stage == 0:
        _convert_replicated(source, target / _FORM, names)
        return
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(source), output_folder=str(target / _FORM), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def load(directory: Path, master: MasterState) -> None:
    """Fill this rank's share of every weight and moment from the universal form. Collective.

    Raises OSError, RuntimeError or KeyError if something is missing or of another shape.
    """
    master.begin()
    form, steps = directory / _FORM / "zero", set()
    for name, parameter in master.parameters():
        for quantity in QUANTITIES:
            master.put(parameter, quantity, _read(form / name, quantity))
        if (form / name / "step.pt").exists():
            steps.add(float(_load(form / name / "step.pt")))
    common = _load(form / "optimizer_state.pt")
    if not steps:  # stage 3
        steps = {float(state["step"]) for state in common["optimizer_state_dict"]["state"].values()}
    if len(steps) != 1:
        raise RuntimeError(f"the parameters' step counters differ: {sorted(steps)}")
    master.set_step(steps.pop())
    master.restore_loss_scale(common)
    master.publish()


def _convert_replicated(source: Path, target: Path, names: list[str]) -> None:
    """Stage 0: the optimizer's state is whole, in one file, under the parameters' numbers."""
    saved = _load(source / "mp_rank_00_model_states.pt")
    states = saved["optimizer"]["state"]
    for number, name in enumerate(names):
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        torch.save(saved["module"][name], folder / "fp32.pt")
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.save(states[number][key], folder / f"{key}.pt")
    torch.save({}, target / "zero" / "optimizer_state.pt")


def _read(folder: Path, quantity: Quantity) -> Tensor:
    content = _load(folder / f"{quantity}.pt")
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor


def _load(path: Path) -> Any:
    # Our own file, whose checksum was compared; DeepSpeed puts objects of its own into it.
    return torch.load(path, map_location="cpu", weights_only=False)
