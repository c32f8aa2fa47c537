"""The vocabulary-sized operations of ENGINE. Every function here has its definition in `ops.reference`."""

from engine_fast.ops import reference
from engine_fast.ops.argmax import linear_argmax
from engine_fast.ops.energy import energy
from engine_fast.ops.library import Implementation, implementation, using
from engine_fast.ops.linear import (
    linear_energy,
    linear_soft_embedding,
    linear_soft_embedding_and_logits,
    teacher_energy,
)
from engine_fast.ops.soft_embedding import soft_embedding

__all__ = [
    "Implementation",
    "energy",
    "implementation",
    "linear_argmax",
    "linear_energy",
    "linear_soft_embedding",
    "linear_soft_embedding_and_logits",
    "reference",
    "soft_embedding",
    "teacher_energy",
    "using",
]
