"""Energies and their gradients at the student's logits, for all 25 pairs of operators."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import EngineConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import PAD
from engine_fast.energies import Relaxation, TeacherEnergy, inner_positions, relaxed_energy, token_energies
from engine_fast.operators import OPERATORS
from engine_fast.training.objectives import EngineObjective

PAIRS = [(o1, o2) for o1 in OPERATORS for o2 in OPERATORS]


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_relaxed_energy_and_gradient(oracle, agree, o1, o2):
    teacher, target = oracle.teacher(), oracle.batch.target
    inner = inner_positions(target)
    z_BTV = oracle.load("student_forward")["logits"].requires_grad_()
    noise = (oracle.gumbel["g1"][inner], oracle.gumbel["g2"][inner])
    energy = relaxed_energy(
        teacher,
        teacher.encode(oracle.batch.source),
        z_BTV[inner],
        target,
        Relaxation(o1, o2, stl_logits="log_probabilities"),
        noise=noise,
    ).sum()
    energy.backward()
    agree(energy, oracle.energies[f"{o1}_{o2}.train.energy"], "energy")
    agree(z_BTV.grad, oracle.energies[f"{o1}_{o2}.train.grad_logits"], "gradient")


@pytest.mark.parametrize("o2", ["STL", "ST"])
def test_the_papers_stl_is_another_gradient(oracle, o2):
    """The switch stl_logits must matter for STL and for nothing else."""
    target, inner = oracle.batch.target, inner_positions(oracle.batch.target)
    gradients = []
    for stl_logits in ("logits", "log_probabilities"):
        teacher, z = oracle.teacher(), oracle.load("student_forward")["logits"].requires_grad_()
        relaxation = Relaxation("SX", o2, stl_logits=stl_logits)
        relaxed_energy(teacher, teacher.encode(oracle.batch.source), z[inner], target, relaxation).sum().backward()
        gradients.append(z.grad)
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12) == (o2 != "STL")


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_objective_totals(oracle, agree, o1, o2):
    config = EngineConfig(o1=o1, o2=o2, stl_logits="log_probabilities")
    objective = EngineObjective(oracle.student(), TeacherEnergy(oracle.teacher()), config)
    inner = inner_positions(oracle.batch.target)
    loss = objective(oracle.batch, noise=(oracle.gumbel["g1"][inner], oracle.gumbel["g2"][inner]))
    prefix = f"{o1}_{o2}.train"
    agree(loss.total, oracle.energies[f"{prefix}.loss_total"], "total")
    assert loss.stats["tokens"] == oracle.energies[f"{prefix}.ntokens"]
    assert math.isclose(loss.stats["length_loss"], oracle.energies[f"{prefix}.length_loss"], rel_tol=1e-6)
    assert math.isclose(loss.stats["energy"], oracle.energies[f"{prefix}.energy"], rel_tol=1e-6)


def test_energy_of_argmax_words(oracle, agree):
    """The authors validate with one-hot arg-max words everywhere, whatever the operators."""
    teacher, target, inner = oracle.teacher(), oracle.batch.target, inner_positions(oracle.batch.target)
    words = target.masked_scatter(inner, oracle.load("student_forward")["logits"][inner].argmax(-1))
    memory = teacher.encode(oracle.batch.source)
    energy = token_energies(teacher, memory, words, real_BT=target != PAD).sum()
    stats = EngineObjective(oracle.student(), TeacherEnergy(teacher), EngineConfig()).evaluate(oracle.batch)
    for o1, o2 in PAIRS:
        for name in ("energy", "discrete_energy"):
            agree(energy, oracle.energies[f"{o1}_{o2}.valid.{name}"], f"{o1} {o2} {name}")
    assert math.isclose(stats["energy"], energy.item(), rel_tol=1e-6)


@pytest.mark.parametrize("o1", OPERATORS)
def test_energy_of_argmax_words_behind_relaxed_ones(oracle, agree, o1):
    """In training the authors' discrete energy scores the arg-max words, but behind a relaxed prefix: O2 = ST."""
    teacher, target, inner = oracle.teacher(), oracle.batch.target, inner_positions(oracle.batch.target)
    memory, z_MV = teacher.encode(oracle.batch.source), oracle.load("student_forward")["logits"][inner]
    energy = relaxed_energy(
        teacher, memory, z_MV, target, Relaxation(o1, "ST"), noise=(oracle.gumbel["g1"][inner], None)
    )
    for o2 in OPERATORS:
        agree(energy.sum(), oracle.energies[f"{o1}_{o2}.train.discrete_energy"], o2)


def test_padding_is_never_read(oracle, agree):
    """Rows of the embedding tables at the padding id are not zero in these sets; three more of them change nothing."""
    objective = EngineObjective(oracle.student(), TeacherEnergy(oracle.teacher()), EngineConfig())
    assert objective.trained.encoder.embedding.weight[PAD].abs().min() > 0
    batch = oracle.batch
    wider = Batch(F.pad(batch.source, (0, 3), value=PAD), F.pad(batch.target, (0, 3), value=PAD), batch.indices)
    agree(objective(wider).total, objective(batch).total)
