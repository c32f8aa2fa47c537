"""What ENGINE is trained with beyond the paper: a temperature schedule, its own lengths, a repetition term."""

import pytest
import torch

from engine_fast.config import Architecture, EngineConfig, TemperatureSchedule
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.decoding import mask_predict_n_best
from engine_fast.energies import Relaxation, TeacherEnergy, inner_positions, relaxed_energy
from engine_fast.errors import ConfigError
from engine_fast.models import CMLM, Transformer, freeze
from engine_fast.training.objectives import EngineObjective, expected_repetitions, slots_of, temperature_at
from engine_fast.training.plan import plan_memory

from .conftest import make_config

SMALL = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=1, decoder_layers=1, max_positions=12, dropout=0.0)
SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [5, EOS, PAD, PAD, PAD]])
BATCH = Batch(SOURCE, TARGET, torch.arange(3))
WORDS = ((0, 4), (4, 6), (6, 7))
"""First and last row of each sentence's words."""


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return freeze(Transformer(SMALL, 20, 20).double())


@pytest.fixture
def student():
    torch.manual_seed(1)
    model = CMLM(SMALL, 20, 20).double()
    model.length_embedding.weight.data.normal_()
    return model


def objective_of(student, teacher, **settings):
    return EngineObjective(student, TeacherEnergy(teacher), EngineConfig.model_validate(settings))


# ---------------------------------------------------------------- O1's temperature


@pytest.mark.parametrize(
    ("shape", "halfway"),
    [("linear", (2.0 + 0.02) / 2), ("exponential", 0.2)],  # 0.2 is the geometric mean
)
def test_a_schedule_runs_from_start_to_end(shape, halfway):
    schedule = TemperatureSchedule(start=2.0, end=0.02, shape=shape)
    found = [temperature_at(schedule, done) for done in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([2.0, halfway, 0.02])


@pytest.mark.parametrize("done", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("head_memory", ["keep", "recompute"])
def test_the_objective_follows_the_schedule_with_o1_alone(student, teacher, head_memory, done):
    settings = {"o2": "SX", "temperature": 0.8, "length_loss_weight": 0.0, "head_memory": head_memory}
    objective = objective_of(student, teacher, o1_temperature={"start": 2.0, "end": 0.5}, **settings)
    if done is not None:
        objective.prepare([BATCH], done=done)
    z = student.project(student.decode(student.encode(SOURCE)[0], torch.where(TARGET != PAD, MASK, PAD)))
    o1 = 2.0 * 0.25 ** (done or 0.0)
    relaxation = Relaxation("SX", "SX", 0.8, o1_temperature=o1)
    expected = relaxed_energy(teacher, teacher.encode(SOURCE), z[inner_positions(TARGET)], TARGET, relaxation)
    torch.testing.assert_close(objective(BATCH).total, expected.sum())


def test_a_schedule_for_an_operator_without_temperature_is_told(student, teacher):
    with pytest.warns(
        UserWarning, match=r"engine.o1_temperature has no effect: engine.o1 = 'STL' reads no temperature"
    ):
        objective = objective_of(student, teacher, o1="STL", o1_temperature={})
    totals = []
    for done in (0.0, 1.0):
        objective.prepare([BATCH], done=done)
        student.zero_grad()
        total = objective(BATCH).total
        total.backward()
        totals.append(torch.cat([total.detach()[None], *(p.grad.flatten() for p in student.parameters())]))
    assert torch.equal(*totals)


def test_dev_figures_do_not_follow_the_schedule(student, teacher):
    plain = objective_of(student, teacher).evaluate(BATCH)
    objective = objective_of(student, teacher, o1_temperature={})
    objective.prepare([], done=1.0)
    assert objective.evaluate(BATCH) == plain


def test_hardening_closes_the_gap(student, teacher):
    """What the schedule is for: between the energy that is trained and that of the words."""
    student.output.weight.data.mul_(0.05)  # soft words
    objective = objective_of(student, teacher, o2="ST", length_loss_weight=0.0, o1_temperature={"end": 1e-4})
    words = objective.evaluate(BATCH)["energy"]
    gaps = []
    for done in (0.0, 0.5, 1.0):
        objective.prepare([BATCH], done=done)
        gaps.append((objective(BATCH).total - words).abs().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-5 * words < 1e-3 * gaps[0]


# ---------------------------------------------------------------- its own lengths


def test_slots_are_those_of_the_most_probable_allowed_length():
    logits = torch.full((4, 9), -5.0)
    logits[:, 0] = float("-inf")
    for sentence, (best, second) in enumerate(((4, 3), (1, 2), (8, 5), (2, 7))):
        logits[sentence, best], logits[sentence, second] = 2.0, 1.0
    assert (slots_of(logits, longest=20) != PAD).sum(1).tolist() == [4, 2, 8, 2]  # a word and the end at least
    assert (slots_of(logits, longest=7) != PAD).sum(1).tolist() == [4, 2, 5, 2]
    assert slots_of(logits, longest=7).shape == (4, 5)
    assert set(slots_of(logits, longest=20).flatten().tolist()) == {MASK, PAD}


def test_slots_are_those_of_decoding(student):
    expected = [len(found[0].tokens) for found in mask_predict_n_best(student, SOURCE)]
    assert (slots_of(student.encode(SOURCE)[1], longest=12) != PAD).sum(1).tolist() == expected
    assert len(set(expected)) > 1


def test_the_energy_is_that_of_the_predicted_slots(student, teacher):
    slots = slots_of(student.encode(SOURCE)[1], longest=12)
    assert (slots != PAD).sum(1).tolist() != (TARGET != PAD).sum(1).tolist()
    own = objective_of(student, teacher, predicted_lengths=True, length_loss_weight=0.5)(BATCH)
    data = objective_of(student, teacher, length_loss_weight=0.5)(BATCH)
    given = objective_of(student, teacher, length_loss_weight=0.0)(Batch(SOURCE, slots, BATCH.indices))
    torch.testing.assert_close(own.total, given.total + 0.5 * data.stats["length_loss"].double())
    for name in ("length_loss", "length_correct", "tokens", "sentences"):  # of the data's lengths
        assert own.stats[name] == data.stats[name]
    assert own.stats["energy"] != data.stats["energy"]


def test_gradients_on_predicted_lengths_are_finite_and_reach_all_parts(student, teacher):
    objective_of(student, teacher, predicted_lengths=True)(BATCH).total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert student.length_embedding.weight.grad.any()
    assert student.output.weight.grad.any()


def test_predicted_lengths_stay_within_budget_and_positions(student, teacher):
    """An untrained student may find the longest class for every sentence."""
    student.length_embedding.weight.data.zero_()
    student.length_embedding.weight.data[:, 0] = torch.arange(12.0)
    memory, logits = student.encode(SOURCE)
    logits[:, 1:] = torch.arange(11.0, dtype=torch.float64)
    shapes, decode = [], student.decode
    student.encode = lambda source: (memory.select(torch.arange(len(source))), logits[: len(source)])
    student.decode = lambda states, tokens: shapes.append(tuple(tokens.shape)) or decode(states, tokens)

    def shape_of(max_tokens, sentences=3):
        batch = Batch(SOURCE[:sentences], TARGET[:sentences], BATCH.indices[:sentences])
        objective_of(student, teacher, predicted_lengths=True, batch={"max_tokens": max_tokens})(batch)
        return shapes[-1]

    assert shape_of(4096) == (3, 11)  # the largest class
    assert shape_of(25) == (3, 8)
    assert shape_of(25, sentences=1) == (1, 11)
    assert shape_of(3) == (3, 2)
    short = Transformer(SMALL.model_copy(update={"max_positions": 6}), 20, 20).double()
    objective_of(student, freeze(short), predicted_lengths=True)(BATCH)
    assert shapes[-1] == (3, 6)


def test_predicted_lengths_and_targets_exclude_each_other():
    with pytest.raises(ConfigError, match="predicted_lengths = true has no targets for cross_entropy_weight"):
        make_config(engine__predicted_lengths=True, engine__cross_entropy_weight=0.5)


# ---------------------------------------------------------------- repetitions


def naive_repetitions(z):
    """Sentence by sentence, pair by pair, word by word."""
    p = z.softmax(-1)
    return sum(
        p[row, word] * p[row + 1, word] for first, end in WORDS for row in range(first, end - 1) for word in range(20)
    )


def test_expected_repetitions_are_those_of_a_plain_loop():
    z = 2 * torch.randn(7, 20, dtype=torch.float64)
    torch.testing.assert_close(expected_repetitions(z, inner_positions(TARGET)), naive_repetitions(z))


def test_certain_rows_count_words_equal_to_the_one_before():
    words = torch.tensor([6, 6, 6, 9, 9, 9, 9])  # the sentences' neighbours do not count
    z = 200.0 * torch.nn.functional.one_hot(words, 20).double()
    assert expected_repetitions(z, inner_positions(TARGET)).item() == pytest.approx(3.0)


def test_expected_repetitions_have_the_true_gradient():
    inner = inner_positions(TARGET)
    z = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: expected_repetitions(z, inner), z)


@pytest.mark.parametrize("words", [0, 1])
def test_sentences_of_at_most_a_word_repeat_nothing(words):
    inner = torch.zeros(3, 5, dtype=torch.bool)
    inner[0, :words] = True
    z = torch.randn(words, 20, requires_grad=True)
    found = expected_repetitions(z, inner)
    found.backward()
    assert found == 0
    assert not z.grad.any()


@pytest.mark.parametrize(
    "settings", [{}, {"predicted_lengths": True}, {"stl_logits": "log_probabilities", "o2": "STL"}]
)
def test_the_term_is_added_with_its_weight(student, teacher, settings):
    losses, gradients = [], []
    for weight in (0.0, 0.5, 2.0):
        student.zero_grad()
        losses.append(objective_of(student, teacher, repetition_weight=weight, **settings)(BATCH))
        losses[-1].total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    repetition = losses[1].stats["repetition"]
    torch.testing.assert_close(losses[2].total - losses[0].total, 2.0 * repetition.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[2] - gradients[0], 4.0 * (gradients[1] - gradients[0]), rtol=1e-6, atol=1e-9)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-4
    assert "repetition" not in losses[0].stats
    if not settings:
        z = student.project(student.decode(student.encode(SOURCE)[0], torch.where(TARGET != PAD, MASK, PAD)))
        torch.testing.assert_close(
            repetition.double(), naive_repetitions(z[inner_positions(TARGET)]), rtol=1e-6, atol=0
        )


def test_recompute_warns_that_the_term_needs_whole_logits(student, teacher):
    with pytest.warns(UserWarning, match=r"head_memory = 'recompute' has no effect: engine.repetition_weight = 0.5"):
        objective = objective_of(student, teacher, head_memory="recompute", repetition_weight=0.5)
    kept = objective_of(student, teacher, repetition_weight=0.5)
    torch.testing.assert_close(objective(BATCH).total, kept(BATCH).total)


# ---------------------------------------------------------------- what cannot be


def test_an_ensemble_cannot_be_sharded_or_planned():
    members = [{"path": "other", "weight": 0.5}]
    with pytest.raises(ConfigError, match="engine: ensemble needs teacher_placement = replicated"):
        make_config(engine__ensemble=members, engine__teacher_placement="sharded")
    config = make_config(engine__ensemble=members)
    with pytest.raises(ConfigError, match=r"engine.ensemble has 1 members, expected none, because the memory plan"):
        plan_memory(config, "engine", ranks=1)
    assert plan_memory(config, "cmlm", ranks=1).total > 0
