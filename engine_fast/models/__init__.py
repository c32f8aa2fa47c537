"""The networks: autoregressive teachers, non-autoregressive students, and their directories on disk."""

from engine_fast.models.cmlm import CMLM
from engine_fast.models.graphs import use_cuda_graphs
from engine_fast.models.lstm import Seq2Seq
from engine_fast.models.precision import Precision, set_precision
from engine_fast.models.protocols import Network, Student, Teacher, Through
from engine_fast.models.stacks import EncoderDecoder, Memory
from engine_fast.models.store import LoadedModel, load_model, save_model
from engine_fast.models.tagger import Tagger
from engine_fast.models.targets import reverse_words, shift_right
from engine_fast.models.transformer import Cache, Transformer, freeze

__all__ = [
    "CMLM",
    "Cache",
    "EncoderDecoder",
    "LoadedModel",
    "Memory",
    "Network",
    "Precision",
    "Seq2Seq",
    "Student",
    "Tagger",
    "Teacher",
    "Through",
    "Transformer",
    "freeze",
    "load_model",
    "reverse_words",
    "save_model",
    "set_precision",
    "shift_right",
    "use_cuda_graphs",
]
