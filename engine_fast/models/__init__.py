"""The networks: an autoregressive teacher, the CMLM student, and their directories on disk."""

from engine_fast.models.cmlm import CMLM
from engine_fast.models.stacks import EncoderDecoder, Memory
from engine_fast.models.store import LoadedModel, load_model, save_model
from engine_fast.models.transformer import Cache, Transformer, freeze, shift_right

__all__ = [
    "CMLM",
    "Cache",
    "EncoderDecoder",
    "LoadedModel",
    "Memory",
    "Transformer",
    "freeze",
    "load_model",
    "save_model",
    "shift_right",
]
