"""The three losses against first principles."""

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import Architecture, CMLMConfig, EngineConfig, TeacherConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.energies import TeacherEnergy, discrete_energy, inner_positions
from engine_fast.models import CMLM, Transformer, freeze, shift_right
from engine_fast.training.objectives import (
    CMLMObjective,
    EngineObjective,
    TeacherObjective,
    draw_masks,
    smoothed_cross_entropy,
)

SMALL = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=2, decoder_layers=2, max_positions=12, dropout=0.0)
SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
BATCH = Batch(SOURCE, TARGET, torch.arange(3))


def build(kind, seed):
    torch.manual_seed(seed)
    return kind(SMALL, 20, 20).double()


@pytest.fixture
def teacher():
    return freeze(build(Transformer, 0))


@pytest.fixture
def student():
    return build(CMLM, 1)


def test_the_teacher_loss_is_torch_label_smoothing(teacher):
    loss = TeacherObjective(teacher, TeacherConfig(label_smoothing=0.1))(BATCH)
    logits = teacher(SOURCE, shift_right(TARGET)).flatten(0, 1)
    gold = TARGET.masked_fill(TARGET == PAD, -100).flatten()
    expected = F.cross_entropy(logits, gold, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.stats["nll"], F.cross_entropy(logits, gold, reduction="sum").float())
    assert loss.stats["tokens"] == 9
    assert loss.stats["sentences"] == 3


def test_no_smoothing_is_plain_cross_entropy():
    logits, gold = torch.randn(4, 7), torch.tensor([1, 2, 3, 6])
    total, nll = smoothed_cross_entropy(logits, gold, 0.0)
    torch.testing.assert_close(total, F.cross_entropy(logits, gold, reduction="sum"))
    torch.testing.assert_close(nll, total)


def test_masks_are_uniform_in_number_and_in_place():
    torch.manual_seed(3)
    real = torch.zeros(40000, 7, dtype=torch.bool)
    real[:, :5] = True
    masked = draw_masks(real)
    counts = masked.sum(-1).bincount(minlength=6)
    assert counts[0] == 0
    assert not masked[:, 5:].any()
    torch.testing.assert_close(counts[1:] / 40000, torch.full((5,), 0.2), atol=0.01, rtol=0)
    torch.testing.assert_close(masked[:, :5].float().mean(0), torch.full((5,), 0.6), atol=0.01, rtol=0)


def test_the_cmlm_loss_counts_masked_tokens_and_lengths(student):
    objective = CMLMObjective(student, CMLMConfig(label_smoothing=0.0, length_loss_weight=0.5))
    masked = torch.zeros_like(TARGET, dtype=torch.bool)
    masked[0, 1] = masked[0, 4] = masked[1, 0] = masked[2, 0] = True
    loss = objective.loss_of(BATCH, masked)

    memory, lengths = student.encode(SOURCE)
    log_p = student.project(student.decode(memory, TARGET.masked_fill(masked, MASK))).log_softmax(-1)
    nll = -log_p[masked].gather(-1, TARGET[masked][:, None]).sum()
    length_loss = -lengths.log_softmax(-1)[torch.arange(3), torch.tensor([5, 3, 1])].sum()
    torch.testing.assert_close(loss.total, nll + 0.5 * length_loss)
    torch.testing.assert_close(loss.stats["length_loss"], length_loss.float())
    assert loss.stats["masked_tokens"] == 4


def test_the_cmlm_is_validated_with_everything_masked(student):
    objective = CMLMObjective(student, CMLMConfig()).eval()
    assert objective(BATCH).stats["masked_tokens"] == 9


def test_engine_is_energy_plus_weighted_length_loss(student, teacher):
    losses = [
        EngineObjective(student, TeacherEnergy(teacher), EngineConfig(length_loss_weight=weight))(BATCH)
        for weight in (0.0, 2.0)
    ]
    torch.testing.assert_close(losses[0].total.float(), losses[0].stats["energy"])
    torch.testing.assert_close(losses[1].total - losses[0].total, 2 * losses[1].stats["length_loss"].double())


def test_engine_trains_the_student_only_and_gives_the_last_slot_no_energy(student, teacher):
    objective = EngineObjective(student, TeacherEnergy(teacher), EngineConfig(length_loss_weight=0.0))
    assert all(name.startswith("trained.") for name, _ in objective.named_parameters())
    objective(BATCH).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.output.weight.grad.abs().sum() > 0
    alone = Batch(SOURCE[2:], TARGET[2:, :1], torch.tensor([2]))  # nothing but the end symbol
    student.zero_grad()
    objective(alone).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_alpha_adds_the_cross_entropy_of_all_real_positions(student, teacher):
    config = EngineConfig(cross_entropy_weight=0.3, label_smoothing=0.1)
    plain = EngineObjective(student, TeacherEnergy(teacher), EngineConfig())(BATCH)
    mixed = EngineObjective(student, TeacherEnergy(teacher), config)(BATCH)
    memory, _ = student.encode(SOURCE)
    real = TARGET != PAD
    logits = student.project(student.decode(memory, torch.where(real, MASK, PAD))[real])
    expected = 0.3 * F.cross_entropy(logits, TARGET[real], label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(mixed.total - plain.total, expected)


def test_evaluate_gives_the_discrete_energy_of_the_arg_max_words(student, teacher):
    objective = EngineObjective(student, TeacherEnergy(teacher), EngineConfig(o1="SX", o2="SX")).eval()
    stats = objective.evaluate(BATCH)
    memory, _ = student.encode(SOURCE)
    real, inner = TARGET != PAD, inner_positions(TARGET)
    words = student.project(student.decode(memory, torch.where(real, MASK, PAD))).argmax(-1)
    words = torch.where(inner, words, TARGET)
    assert not ((words == PAD) & real).any()
    torch.testing.assert_close(stats["energy"], discrete_energy(teacher, SOURCE, words).sum().float())
    torch.testing.assert_close(stats["relaxed_energy"], objective(BATCH).stats["energy"])


def test_evaluate_scores_an_arg_max_pad_as_a_word(student, teacher):
    student.output.weight.data[:] = 0
    student.output.weight.data[PAD] = student.decode(student.encode(SOURCE)[0], TARGET)[0, 0]  # PAD wins somewhere
    stats = EngineObjective(student, TeacherEnergy(teacher), EngineConfig()).eval().evaluate(BATCH)
    assert stats["energy"].isfinite()
    assert stats["energy"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_lowers_its_energy(teacher, student, dtype):
    objective = EngineObjective(student.to(dtype), TeacherEnergy(teacher.to(dtype)), EngineConfig(o1="SX", o2="ST"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    energies = []
    for _ in range(30):
        loss = objective(BATCH)
        optimizer.zero_grad()
        (loss.total / 9).backward()
        optimizer.step()
        energies.append(loss.stats["energy"].item())
    assert energies[-1] < 0.8 * energies[0]


@pytest.mark.parametrize("settings", [{"cross_entropy_weight": 0.5}, {"o2": "STL", "stl_logits": "log_probabilities"}])
def test_recompute_warns_where_the_logits_are_needed_whole(student, teacher, settings):
    config = EngineConfig.model_validate({"head_memory": "recompute", **settings})
    with pytest.warns(UserWarning, match="head_memory = 'recompute' has no effect"):
        objective = EngineObjective(student, TeacherEnergy(teacher), config)
    kept = EngineObjective(student, TeacherEnergy(teacher), config.model_copy(update={"head_memory": "keep"}))
    torch.testing.assert_close(objective(BATCH).total, kept(BATCH).total)
