"""From a model to text: search, mask-predict, streaming translation. Distillation is engine_fast.decoding.distill."""

from engine_fast.decoding.autoregressive import MaxLength, beam_search, greedy
from engine_fast.decoding.generate import generate
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.decoding.mask_predict import (
    Candidates,
    Observe,
    Rescore,
    mask_predict,
    mask_predict_candidates,
    mask_predict_n_best,
)
from engine_fast.decoding.sources import TranslateReport
from engine_fast.decoding.translate import DecodeSettings, Translator

__all__ = [
    "Candidates",
    "DecodeSettings",
    "Hypothesis",
    "MaxLength",
    "Observe",
    "Rescore",
    "TranslateReport",
    "Translator",
    "beam_search",
    "generate",
    "greedy",
    "mask_predict",
    "mask_predict_candidates",
    "mask_predict_n_best",
]
