"""Logits, length distributions and teacher scores of the imported models."""

from __future__ import annotations

import torch

from engine_fast.data.symbols import PAD
from engine_fast.energies import discrete_energy, token_energies
from engine_fast.models import shift_right


def test_tying_is_recognised(oracle):
    student, teacher = oracle.student(), oracle.teacher()
    expected = ("all", "all") if oracle.meta["shared"] else ("none", "decoder")
    assert (student.architecture.tie, teacher.architecture.tie) == expected


def test_student_logits_and_lengths(oracle, agree):
    student, batch, theirs = oracle.student(), oracle.batch, oracle.load("student_forward")
    memory, _ = student.encode(batch.source)
    agree(memory.states[memory.mask], theirs["encoder_out"][batch.source != PAD], "encoder states")
    logits = student.project(student.decode(memory, oracle.load("batch")["prev_output_tokens"]))
    real = batch.target != PAD
    agree(logits[real], theirs["logits"][real], "logits")
    agree(logits.log_softmax(-1)[real], theirs["lprobs"][real], "log-probabilities")
    lengths = student.lengths(batch.source)
    assert torch.isneginf(lengths[:, 0]).all()
    agree(lengths[:, 1:], theirs["length_lprobs"][:, 1:], "length log-probabilities")


def test_teacher_positions_are_the_authors(oracle):
    theirs = oracle.load("teacher_state")["__extra__.sinusoid_table"]
    table = oracle.teacher().encoder.positions.table
    torch.testing.assert_close(table, theirs[PAD + 1 :][: len(table)], rtol=0, atol=0)


def test_teacher_scores(oracle, agree):
    teacher, batch, theirs = oracle.teacher(), oracle.batch, oracle.load("teacher_hard")
    real = batch.target != PAD
    decoder_input = shift_right(batch.target)
    assert torch.equal(decoder_input[real], theirs["prev_output_tokens"][real])
    memory = teacher.encode(batch.source)
    agree(memory.states[memory.mask], theirs["encoder_out"][batch.source != PAD], "encoder states")
    logits = teacher(batch.source, decoder_input)
    agree(logits[real], theirs["logits"][real], "logits")
    agree(logits.log_softmax(-1)[real], theirs["lprobs"][real], "log-probabilities")
    agree(token_energies(teacher, memory, batch.target)[real], theirs["nll_per_token"][real], "token energies")
    agree(discrete_energy(teacher, batch.source, batch.target), theirs["nll_per_sentence"], "discrete energy")


def test_stepwise_decoding_equals_teacher_forcing(oracle, agree):
    teacher, batch, theirs = oracle.teacher(), oracle.batch, oracle.load("teacher_hard")
    cache = teacher.start_cache(teacher.encode(batch.source))
    for position in range(batch.target.shape[1]):
        logits = teacher.step(theirs["prev_output_tokens"][:, position], cache)
        real = batch.target[:, position] != PAD
        agree(logits[real], theirs["logits"][real, position], f"position {position}")
