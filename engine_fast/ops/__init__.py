"""The vocabulary-sized operations of ENGINE. Every function here has its definition in `ops.reference`."""

from engine_fast.ops import reference
from engine_fast.ops.reference import energy, linear_energy, linear_soft_embedding, soft_embedding

__all__ = ["energy", "linear_energy", "linear_soft_embedding", "reference", "soft_embedding"]
