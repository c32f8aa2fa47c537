"""An ensemble's energy is the weighted sum of its members', whatever form the student's logits have."""

import pytest
import torch

from engine_fast import ops
from engine_fast.config import Architecture, EngineConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, PAD
from engine_fast.energies import (
    EnsembleEnergy,
    GivenLogits,
    KeptLogits,
    RecomputedLogits,
    Relaxation,
    TeacherEnergy,
    inner_positions,
)
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import EngineObjective

SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [5, EOS, PAD, PAD, PAD]])
BATCH = Batch(SOURCE, TARGET, torch.arange(3))
WEIGHTS = [1.0, 0.25, 2.0]
FORMS = {"given": GivenLogits, "kept": KeptLogits, "recomputed": RecomputedLogits}
PAIRS = [("SX", "ST"), ("SX", "SX"), ("STL", "STL"), ("SG", "GX"), ("GX", "SG")]
SMALL = {"ffn_width": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 12, "dropout": 0.0}


def network(kind, width, seed):
    torch.manual_seed(seed)
    return kind(Architecture(width=width, **SMALL), 20, 20).double()


@pytest.fixture
def teachers():
    """Of three widths; the second reads from right to left."""
    found = [freeze(network(Transformer, width, seed)) for seed, width in enumerate((16, 8, 24))]
    found[1].right_to_left = True
    return found


@pytest.fixture
def student():
    return network(CMLM, 16, 9)


def ensemble_of(teachers):
    return EnsembleEnergy([TeacherEnergy(teacher) for teacher in teachers], WEIGHTS)


def scored(student, energy, form, relaxation, noise, *, reduction="none"):
    """(energies, gradients of the student's weights) of a pass of the student."""
    student.zero_grad()
    memory, _ = student.encode(SOURCE)
    hidden = student.decode(memory, TARGET)[inner_positions(TARGET)]
    logits = GivenLogits(student.project(hidden)) if form == "given" else FORMS[form](student, hidden)
    with torch.no_grad():
        of_teachers = energy.encode(SOURCE)
    found = energy.score_relaxed(of_teachers, logits, TARGET, relaxation, noise=noise, reduction=reduction)
    (found.sum() if reduction == "sum" else (found * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_values_and_gradients_are_the_weighted_sum_of_the_members(
    teachers, student, o1, o2, form, reduction, implementation
):
    if implementation == "fused" and ops.implementation() == "reference":
        pytest.skip("nothing is compiled")
    noise = (torch.tensor(5), torch.tensor(6))  # seeds: the recomputing form takes no other noise
    relaxation = Relaxation(o1, o2, temperature=0.7)
    with ops.using(implementation):
        found = scored(student, ensemble_of(teachers), form, relaxation, noise, reduction=reduction)
        parts = [
            scored(student, TeacherEnergy(teacher), form, relaxation, noise, reduction=reduction)
            for teacher in teachers
        ]
    for got, members in zip(found, zip(*parts, strict=True), strict=True):
        expected = sum(weight * member for weight, member in zip(WEIGHTS, members, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_every_member_sees_the_same_noise(student, teachers, form):
    """Three times the same teacher: were the noise drawn for each, their energies would differ."""
    relaxation, energy = Relaxation("SG", "SG"), TeacherEnergy(teachers[0])
    torch.manual_seed(3)
    (single, gradient) = scored(student, energy, form, relaxation, (None, None))
    torch.manual_seed(3)
    (tripled, gradients) = scored(student, EnsembleEnergy([energy] * 3, WEIGHTS), form, relaxation, (None, None))
    torch.testing.assert_close(tripled, sum(WEIGHTS) * single, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, sum(WEIGHTS) * gradient, rtol=1e-9, atol=1e-10)
    torch.manual_seed(4)
    assert not torch.allclose(scored(student, energy, form, relaxation, (None, None))[0], single)


def test_an_ensemble_of_one_is_that_one(student, teachers):
    energy = TeacherEnergy(teachers[0])
    noise = (None, None)
    torch.manual_seed(3)
    alone = scored(student, energy, "kept", Relaxation("GX", "SG"), noise)
    torch.manual_seed(3)
    one = scored(student, EnsembleEnergy([energy], [1.0]), "kept", Relaxation("GX", "SG"), noise)
    assert all(torch.equal(a, b) for a, b in zip(alone, one, strict=True))


def test_energies_of_words_and_translations(teachers):
    energy = ensemble_of(teachers)
    assert energy.teachers == tuple(teachers)
    memory = energy.encode(SOURCE)
    expected = sum(
        weight * TeacherEnergy(teacher).score(own, TARGET)
        for weight, teacher, own in zip(WEIGHTS, teachers, memory, strict=True)
    )
    torch.testing.assert_close(energy.score(memory, TARGET), expected)
    assert energy.generate(SOURCE, beam=2) == TeacherEnergy(teachers[0]).generate(SOURCE, beam=2)


@pytest.mark.parametrize("settings", [{"head_memory": "keep"}, {"head_memory": "recompute"}], ids=str)
def test_the_objective_prepares_and_evaluates_every_member(student, teachers, settings):
    config = EngineConfig(length_loss_weight=0.0, **settings)
    objective = EngineObjective(student, ensemble_of(teachers), config)
    parts = [EngineObjective(student, TeacherEnergy(teacher), config) for teacher in teachers]
    encoded = []
    for teacher in teachers:
        encode = teacher.encode
        teacher.encode = lambda source, encode=encode: encoded.append(1) or encode(source)
    objective.prepare([BATCH], done=0.0)
    assert len(encoded) == 3
    total = objective(BATCH).total
    assert len(encoded) == 3
    expected = sum(weight * part(BATCH).total for weight, part in zip(WEIGHTS, parts, strict=True))
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    stats, others = objective.evaluate(BATCH), [part.evaluate(BATCH) for part in parts]
    for name in ("energy", "relaxed_energy"):
        expected = sum(weight * other[name] for weight, other in zip(WEIGHTS, others, strict=True))
        torch.testing.assert_close(stats[name], expected)
