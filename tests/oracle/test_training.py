"""Losses, parameter gradients and optimiser steps, parameter by parameter."""

from __future__ import annotations

import re

import pytest
import torch

from engine_fast.config import CMLMConfig, EngineConfig, TeacherConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import MASK
from engine_fast.energies import TeacherEnergy
from engine_fast.training.objectives import CMLMObjective, EngineObjective, TeacherObjective


@pytest.mark.parametrize("case", ["SX_SX_alpha0", "SX_SX_alpha1", "SX_ST_alpha0", "STL_STL_alpha0"])
def test_engine_parameter_gradients(oracle, agree, agree_by_name, case):
    o1, o2, alpha = re.fullmatch(r"(\w+)_(\w+)_alpha(\d)", case).groups()
    theirs = oracle.load(f"paramgrad_{case}")
    config = EngineConfig(o1=o1, o2=o2, cross_entropy_weight=float(alpha), stl_logits="log_probabilities")
    objective = EngineObjective(oracle.student(), TeacherEnergy(oracle.teacher().requires_grad_(False)), config)
    loss = objective(oracle.batch)
    loss.total.backward()
    agree(loss.total, theirs["__loss__"], "loss")
    assert loss.stats["tokens"] == theirs["__sample_size__"]
    agree_by_name(objective.trained, theirs, _gradient)
    assert all(parameter.grad is None for parameter in objective.teachers[0].parameters())


def test_cmlm_loss_and_gradients(oracle, agree, agree_by_name):
    theirs = oracle.load("cmlm_loss")
    objective = CMLMObjective(oracle.student(), CMLMConfig())
    loss = objective.loss_of(oracle.batch, theirs["prev_output_tokens"] == MASK)
    loss.total.backward()
    agree(loss.total, theirs["__loss__"], "loss")
    agree_by_name(objective.trained, theirs, _gradient)


def test_teacher_loss_and_gradients(oracle, agree, agree_by_name):
    theirs = oracle.load("ar_loss")
    objective = TeacherObjective(oracle.teacher(), TeacherConfig())
    loss = objective(oracle.batch)
    loss.total.backward()
    agree(loss.total, theirs["__loss__"], "loss")
    agree_by_name(objective.trained, theirs, _gradient)


def test_three_adam_updates(oracle, agree, agree_by_name):
    """Two micro-batches an update, gradients summed and divided by the number of target tokens.

    The authors add epsilon to sqrt(v) before its bias is corrected, torch afterwards; eps / sqrt(1 - b2^t) in torch
    is their eps.
    """
    theirs, eps, beta2 = oracle.load("adam_3updates_SX_ST"), 1e-8, 0.999
    objective = EngineObjective(
        oracle.student(), TeacherEnergy(oracle.teacher().requires_grad_(False)), EngineConfig(o1="SX", o2="ST")
    )
    student = objective.trained
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, beta2), weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        total = tokens = 0.0
        for rows in (slice(0, 2), slice(2, 4)):
            batch = Batch(oracle.batch.source[rows], oracle.batch.target[rows], oracle.batch.indices[rows])
            loss = objective(batch)
            loss.total.backward()
            total, tokens = total + loss.total.detach(), tokens + loss.stats["tokens"].double()
        for parameter in student.parameters():
            parameter.grad /= tokens
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 25.0)
        optimizer.param_groups[0]["eps"] = eps / (1 - beta2 ** (step + 1)) ** 0.5
        optimizer.step()
        agree(total, theirs[f"step{step}.loss_sum"], f"loss of update {step}")
        agree(norm, theirs[f"step{step}.gnorm"], f"gradient norm of update {step}")
        assert tokens == theirs[f"step{step}.sample_size"]
    after = {name.removeprefix("param."): value for name, value in theirs.items() if name.startswith("param.")}
    agree_by_name(student, after, lambda parameter: parameter)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
