"""The vocabulary-sized operations of ENGINE. Every function here has its definition in `ops.reference`."""

from engine_fast.ops import reference
from engine_fast.ops.closed import energy, soft_embedding
from engine_fast.ops.reference import linear_energy, linear_soft_embedding

__all__ = ["energy", "linear_energy", "linear_soft_embedding", "reference", "soft_embedding"]
