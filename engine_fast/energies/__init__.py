"""What a frozen teacher says of a translation, discrete or relaxed."""

from engine_fast.energies.energy import Energy, EnsembleEnergy, TeacherEnergy
from engine_fast.energies.relaxed import (
    GivenLogits,
    KeptLogits,
    RecomputedLogits,
    Relaxation,
    inner_positions,
    relaxed_energy,
)
from engine_fast.energies.scaling import GradientScale, ScaledHead
from engine_fast.energies.score import discrete_energy, token_energies

__all__ = [
    "Energy",
    "EnsembleEnergy",
    "GivenLogits",
    "GradientScale",
    "KeptLogits",
    "RecomputedLogits",
    "Relaxation",
    "ScaledHead",
    "TeacherEnergy",
    "discrete_energy",
    "inner_positions",
    "relaxed_energy",
    "token_energies",
]
