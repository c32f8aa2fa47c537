"""What DeepSpeed 0.19.8 does and the engine works around. If one fails after an upgrade, look at its workaround again.

Each runs in a process of its own, because DeepSpeed changes torch for all of it.
"""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import copy, math, os, warnings
warnings.simplefilter("ignore")
import torch, torch.nn.functional as F
from engine_fast.config import RuntimeConfig
from engine_fast.distributed import start
start(RuntimeConfig(device="cpu", threads=1))
import deepspeed

def engine_of(model, precision="fp32", lr=0.1, **zero):
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": None,
        "bf16": {"enabled": precision == "bf16"}, "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

torch.manual_seed(0)
"""


def holds(tmp_path, body):
    script = tmp_path / "canary.py"
    script.write_text(PRELUDE + textwrap.dedent(body))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_stage_3_replaces_linear_for_models_outside_unless_told_not_to(tmp_path):
    """Why zero_optimization.memory_efficient_linear is ours: the frozen teacher would change."""
    holds(
        tmp_path,
        """
        plain = F.linear
        engine_of(torch.nn.Linear(3, 3), stage=3, memory_efficient_linear=False)
        assert F.linear is plain
        engine_of(torch.nn.Linear(3, 3), stage=3)
        assert F.linear is not plain
        """,
    )


def test_stage_0_in_bf16_starts_adam_a_step_late(tmp_path):
    """Why half precision needs zero_stage >= 1."""
    holds(
        tmp_path,
        """
        def moved(stage):
            model = torch.nn.Linear(4, 1, bias=False)
            torch.nn.init.zeros_(model.weight)
            engine = engine_of(model, "bf16", stage=stage)
            engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
            engine.step()
            return float(model.weight.abs().max())

        assert abs(moved(1) - 0.1) < 1e-3, "Adam's first step is the learning rate"
        assert moved(0) < 0.09
        """,
    )


def test_stage_0_in_fp32_reports_no_norm_and_applies_nan(tmp_path):
    """Why Engine clips and checks for itself at stage 0."""
    holds(
        tmp_path,
        """
        model = torch.nn.Linear(4, 1)
        engine = engine_of(model, stage=0)
        engine.backward(engine(torch.ones(1, 4)).sum() * float("nan"))
        engine.step()
        assert engine.get_global_grad_norm() is None
        assert bool(model.weight.isnan().all())
        """,
    )


@pytest.mark.slow
def test_a_save_that_fails_leaves_half_a_checkpoint_under_its_name(tmp_path):
    """Why checkpoints are written into a hidden directory that is renamed when it is whole."""
    holds(
        tmp_path,
        f"""
        folder = {str(tmp_path / "saved")!r}
        engine = engine_of(torch.nn.Linear(4, 1), stage=1)
        engine.save_checkpoint(folder, tag="first")
        real = torch.save

        def failing(obj, path, *args, **kwargs):
            if "optim_states" in str(path):
                raise OSError("no space left")
            return real(obj, path, *args, **kwargs)

        torch.save = failing
        try:
            engine.save_checkpoint(folder, tag="second")
        except OSError:
            pass
        else:
            raise AssertionError("the save did not fail")
        present = os.listdir(os.path.join(folder, "second"))
        assert any("model_states" in name for name in present), present
        assert not any("optim_states" in name for name in present), present
        """,
    )


@pytest.mark.slow
def test_an_unknown_key_is_ignored(tmp_path):
    """Why the deepspeed: section is checked against a list of names."""
    holds(
        tmp_path,
        """
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimisation": {"stage": 3}}
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        assert engine.zero_optimization_stage() == 0
        """,
    )
