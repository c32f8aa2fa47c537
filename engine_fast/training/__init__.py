"""From a corpus to a trained model: one loop on the DeepSpeed engine for teacher, CMLM and ENGINE."""

from engine_fast.training.interrupt import Interrupted
from engine_fast.training.reuse import Reuse
from engine_fast.training.stages import train_cmlm, train_engine, train_teacher

__all__ = ["Interrupted", "Reuse", "train_cmlm", "train_engine", "train_teacher"]
