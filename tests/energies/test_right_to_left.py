"""A right-to-left teacher is a left-to-right one on reversed words: same weights, targets turned by hand."""

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import Architecture, TeacherConfig
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, PAD
from engine_fast.decoding import generate
from engine_fast.energies import Relaxation, discrete_energy, inner_positions, relaxed_energy, token_energies
from engine_fast.models import Transformer, freeze, reverse_words
from engine_fast.training.objectives import TeacherObjective
from tests.decoding.tiny import make_teacher

SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD], [6, 6, 7, EOS]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD], [5, EOS, PAD, PAD, PAD]])
TURNED = torch.tensor([[9, 8, 7, 6, EOS], [11, 10, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD], [5, EOS, PAD, PAD, PAD]])
ROWS = [3, 2, 1, 0, 5, 4, 6]
"""The student's rows, of sentences of 4, 2, 0 and 1 words, each sentence's in the opposite order."""
PAIRS = [("SX", "ST"), ("SX", "SX"), ("STL", "STL"), ("SG", "GX"), ("GX", "SG")]


@pytest.fixture
def pair():
    """The same weights twice: one reads from left to right, the other from right to left."""
    architecture = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=1, decoder_layers=2, max_positions=12)
    teachers = []
    for _ in range(2):
        torch.manual_seed(0)
        teachers.append(freeze(Transformer(architecture, 20, 20).double()))
    teachers[1].right_to_left = True
    return teachers


def test_words_are_reversed_and_end_symbol_and_padding_stay():
    real = TARGET != PAD
    assert torch.equal(reverse_words(TARGET, real), TURNED)
    assert torch.equal(reverse_words(TURNED, real), TARGET)
    none = torch.zeros_like(real)
    assert torch.equal(reverse_words(TARGET, none), TARGET)


def test_a_word_that_is_padding_counts_where_it_is_real(pair):
    real, words = TARGET != PAD, TARGET.clone()
    words[0, 1] = PAD
    assert reverse_words(words, real)[0].tolist() == [9, 8, PAD, 6, EOS]
    forward, backward = pair
    turned = token_energies(forward, forward.encode(SOURCE), reverse_words(words, real), real_BT=real)
    found = token_energies(backward, backward.encode(SOURCE), words, real_BT=real)
    assert torch.equal(found, reverse_words(turned, real))


def test_token_energies_are_those_of_reversed_targets_in_reading_order(pair):
    forward, backward = pair
    turned = token_energies(forward, forward.encode(SOURCE), TURNED)
    found = token_energies(backward, backward.encode(SOURCE), TARGET)
    expected = turned.clone()
    for sentence, words in enumerate((4, 2, 0, 1)):
        expected[sentence, :words] = turned[sentence, :words].flip(0)
    assert torch.equal(found, expected)
    assert not torch.allclose(found[0], token_energies(forward, forward.encode(SOURCE), TARGET)[0])


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_the_relaxed_energy_is_that_of_reversed_rows(pair, o1, o2):
    forward, backward = pair
    relaxation = Relaxation(o1, o2)
    noise = [torch.randn(7, 20, dtype=torch.float64) for _ in range(2)]
    z = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    found = relaxed_energy(backward, backward.encode(SOURCE), z, TARGET, relaxation, noise=tuple(noise))
    turned = relaxed_energy(
        forward, forward.encode(SOURCE), z[ROWS], TARGET, relaxation, noise=tuple(part[ROWS] for part in noise)
    )
    torch.testing.assert_close(found, turned, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    (one,), (other,) = (torch.autograd.grad((energy * weights).sum(), z) for energy in (found, turned))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert one.abs().amax(-1).gt(0).all()


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_a_certain_student_has_the_discrete_energy(pair, o1, o2):
    _, backward = pair
    z = 200.0 * F.one_hot(TARGET[inner_positions(TARGET)], 20).double()
    energy = relaxed_energy(backward, backward.encode(SOURCE), z, TARGET, Relaxation(o1, o2))
    torch.testing.assert_close(energy, discrete_energy(backward, SOURCE, TARGET))


def test_the_sum_is_the_sum(pair):
    _, backward = pair
    z = torch.randn(7, 20, dtype=torch.float64)
    each = relaxed_energy(backward, backward.encode(SOURCE), z, TARGET, Relaxation())
    total = relaxed_energy(backward, backward.encode(SOURCE), z, TARGET, Relaxation(), reduction="sum")
    torch.testing.assert_close(total, each.sum())


def test_soft_operators_have_the_true_gradient(pair):
    _, backward = pair
    memory, z = backward.encode(SOURCE), torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: relaxed_energy(backward, memory, z, TARGET, Relaxation("SX", "SX")), z)


@pytest.mark.parametrize("beam", [1, 3])
def test_translations_come_in_reading_order_with_their_own_energy(beam):
    forward, backward = make_teacher(seed=3), make_teacher(seed=3)
    backward.right_to_left = True
    straight = generate(forward, SOURCE, beam=beam, n_best=beam)
    turned = generate(backward, SOURCE, beam=beam, n_best=beam)
    assert any(len(set(h.tokens[:-1])) > 1 for hypotheses in turned for h in hypotheses)  # order shows
    for sentence, (one, other) in enumerate(zip(straight, turned, strict=True)):
        for left, right in zip(one, other, strict=True):
            assert right.tokens == [*left.tokens[:-1][::-1], EOS]
            energy = discrete_energy(backward, SOURCE[sentence : sentence + 1], torch.tensor([right.tokens]))
            assert energy.item() == pytest.approx(-right.log_probability, abs=1e-10)
            assert right.score == left.score


def test_an_empty_translation_stays_one():
    backward = make_teacher()
    backward.right_to_left = True
    assert generate(backward, SOURCE, beam=2, max_length=(0.0, 0.0))[0][0].tokens == [EOS]


def test_training_learns_the_reversed_targets(pair):
    forward, backward = pair
    config = TeacherConfig(label_smoothing=0.1)
    indices = torch.arange(4)
    one = TeacherObjective(backward, config)(Batch(SOURCE, TARGET, indices))
    other = TeacherObjective(forward, config)(Batch(SOURCE, TURNED, indices))
    assert torch.equal(one.total, other.total)
    assert torch.equal(one.stats["nll"], other.stats["nll"])
    torch.testing.assert_close(
        one.stats["nll"].double(), discrete_energy(backward, SOURCE, TARGET).sum(), rtol=1e-6, atol=0
    )
