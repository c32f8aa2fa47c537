"""Relaxed and discrete energies against each other and against first principles."""

import pytest
import torch
import torch.nn.functional as F

from engine_fast.config import Architecture
from engine_fast.data.symbols import EOS, PAD
from engine_fast.energies import Relaxation, discrete_energy, inner_positions, relaxed_energy, token_energies
from engine_fast.models import Transformer, freeze, shift_right

SOURCE = torch.tensor([[7, 9, 5, EOS], [8, 6, EOS, PAD], [11, EOS, PAD, PAD]])
TARGET = torch.tensor([[6, 7, 8, 9, EOS], [10, 11, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
PAIRS = [(o1, o2) for o1 in ("SX", "STL", "SG", "ST", "GX") for o2 in ("SX", "STL", "SG", "ST", "GX")]


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    config = Architecture(width=16, ffn_width=24, heads=2, encoder_layers=2, decoder_layers=2, max_positions=12)
    return freeze(Transformer(config, 20, 20).double())


def one_hot_logits(scale=200.0):
    return scale * F.one_hot(TARGET[inner_positions(TARGET)], 20).double()


def test_discrete_energy_is_the_negative_log_likelihood(teacher):
    log_p = teacher(SOURCE, shift_right(TARGET)).log_softmax(-1)
    expected = [-sum(log_p[b, t, TARGET[b, t]] for t in range(n)) for b, n in enumerate((5, 3, 1))]
    torch.testing.assert_close(discrete_energy(teacher, SOURCE, TARGET), torch.stack(expected))


def test_token_energies_are_zero_at_padding_only(teacher):
    energies = token_energies(teacher, teacher.encode(SOURCE), TARGET)
    assert torch.equal(energies == 0, TARGET == PAD)


def test_inner_positions_leave_out_padding_and_the_end():
    assert inner_positions(TARGET).sum(-1).tolist() == [4, 2, 0]


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_a_certain_student_has_the_discrete_energy(teacher, o1, o2):
    energy = relaxed_energy(teacher, teacher.encode(SOURCE), one_hot_logits(), TARGET, Relaxation(o1, o2))
    torch.testing.assert_close(energy, discrete_energy(teacher, SOURCE, TARGET))


@pytest.mark.parametrize(("o1", "o2"), PAIRS)
def test_gradients_reach_every_student_row_and_no_teacher_weight(teacher, o1, o2):
    z = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    relaxed_energy(teacher, teacher.encode(SOURCE), z, TARGET, Relaxation(o1, o2)).sum().backward()
    assert z.grad.abs().amax(-1).gt(0).all()
    assert all(p.grad is None for p in teacher.parameters())


def test_soft_operators_have_the_true_gradient(teacher):
    memory = teacher.encode(SOURCE)
    z = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: relaxed_energy(teacher, memory, z, TARGET, Relaxation("SX", "SX")), z)


def test_padding_and_neighbours_change_nothing(teacher):
    z = torch.randn(6, 20, dtype=torch.float64)
    together = relaxed_energy(teacher, teacher.encode(SOURCE), z, TARGET, Relaxation())
    source, target = SOURCE[1:2, :3], TARGET[1:2, :3]
    alone = relaxed_energy(teacher, teacher.encode(source), z[4:6], target, Relaxation())
    torch.testing.assert_close(together[1:2], alone, rtol=1e-10, atol=1e-10)


def test_o1_and_o2_draw_independent_noise(teacher):
    z, memory = torch.zeros(6, 20, dtype=torch.float64), teacher.encode(SOURCE)
    noise = [torch.randn(6, 20, dtype=torch.float64) for _ in range(3)]
    relaxation = Relaxation("SG", "SG")

    def energy(first, second):
        return relaxed_energy(teacher, memory, z, TARGET, relaxation, noise=(noise[first], noise[second])).sum()

    values = {energy(a, b).item() for a, b in ((0, 1), (0, 2), (2, 1))}
    assert len(values) == 3
    torch.manual_seed(7)
    drawn = {relaxed_energy(teacher, memory, z, TARGET, relaxation).sum().item() for _ in range(3)}
    assert len(drawn) == 3


def test_stl_with_respect_to_log_probabilities_differs_in_gradient_only(teacher):
    memory = teacher.encode(SOURCE)
    results = []
    for wrt in ("logits", "log_probabilities"):
        z = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        energy = relaxed_energy(teacher, memory, z, TARGET, Relaxation("SX", "STL", stl_logits=wrt)).sum()
        energy.backward()
        results.append((energy.item(), z.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert (results[0][1] - results[1][1]).abs().max() > 1e-3
    # log q's Jacobian removes the mean direction: each row of the gradient sums to zero
    torch.testing.assert_close(results[1][1].sum(-1), torch.zeros(6, dtype=torch.float64), atol=1e-10, rtol=0)
