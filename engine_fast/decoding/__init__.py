"""From a model to text: search, mask-predict, streaming translation, distillation."""

from engine_fast.decoding.autoregressive import beam_search, greedy
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.decoding.mask_predict import (
    Candidates,
    Rescore,
    mask_predict,
    mask_predict_candidates,
    mask_predict_n_best,
)

__all__ = [
    "Candidates",
    "Hypothesis",
    "Rescore",
    "beam_search",
    "greedy",
    "mask_predict",
    "mask_predict_candidates",
    "mask_predict_n_best",
]
