"""A float16 teacher beside a float32 student: its gradients survive a loss that was divided by many tokens."""

import pytest
import torch

from engine_fast import ops
from engine_fast.config import Architecture, EngineConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, PAD
from engine_fast.energies import GradientScale, TeacherEnergy
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import EngineObjective

SMALL = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=1, decoder_layers=1, max_positions=12, dropout=0.0)
SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD]])
BATCH = Batch(SOURCE, TARGET, torch.arange(2))


def gradients(dtype, divisor, **settings):
    """Of the student's weights, times the divisor, under a teacher of `dtype`."""
    torch.manual_seed(0)
    student, teacher = CMLM(SMALL, 20, 20), freeze(Transformer(SMALL, 20, 20).half(), dtype=dtype)
    objective = EngineObjective(student, TeacherEnergy(teacher), EngineConfig.model_validate(settings))
    with ops.using("reference"):
        (objective(BATCH).total / divisor).backward()
    return torch.cat([p.grad.flatten() * divisor for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "settings",
    [
        {"head_memory": "keep"},
        {"head_memory": "recompute"},
        {"cross_entropy_weight": 0.5},
        {"repetition_weight": 2.0},
        {"o1": "STL", "stl_logits": "log_probabilities"},
    ],
    ids=str,
)
def test_dividing_the_loss_by_many_tokens_loses_nothing(settings):
    truth = gradients(torch.float32, 1.0, **settings)
    undivided, divided = (gradients(torch.float16, divisor, **settings) for divisor in (1.0, 2.0**20))
    torch.testing.assert_close(divided, undivided, rtol=1e-6, atol=1e-7)  # a power of two: only float32 sums differ
    assert (divided - truth).norm() < 5e-3 * truth.norm()


def test_without_the_scale_they_vanish(monkeypatch):
    monkeypatch.setattr(EngineObjective, "_scale", lambda self, hidden: None)
    truth, divided = gradients(torch.float32, 1.0), gradients(torch.float16, 2.0**20)
    assert (divided - truth).norm() > 0.02 * truth.norm()


def test_the_scale_is_the_power_of_two_that_makes_the_gradient_about_one():
    scale, x = GradientScale(), torch.tensor([3.0], requires_grad=True)
    seen = []
    inner = scale.leave(x)
    y = inner * 2
    y.register_hook(seen.append)
    (scale.watch(scale.enter(y).sum()) * 3e-5).backward()
    assert seen[0].item() == pytest.approx(3e-5 * 2**16)
    assert x.grad.item() == pytest.approx(6e-5)


def test_a_stand_in_batch_of_weight_zero_has_zero_gradients():
    scale, x = GradientScale(), torch.tensor([3.0], requires_grad=True)
    (scale.watch(scale.enter(scale.leave(x) * 2).sum()) * 0.0).backward()
    assert x.grad.item() == 0
