"""A CMLM student as two ONNX programs, which onnxruntime runs without torch and without this project.

Of the forms tried on the small Multi30k student (benchmarks/NOTES.md) onnxruntime and AOTInductor were the fastest for
a sentence alone; onnxruntime needs neither a compiler nor torch where it runs.

B sentences, K length candidates, S source positions, T target positions, V vocabulary, D width, L length classes.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.data.vocabulary import DictionaryVocabulary, SentencePieceVocabulary
from engine_fast.errors import CheckpointError, ConfigError, VocabularyError, require
from engine_fast.inference.directory import export_directory
from engine_fast.models import CMLM, LoadedModel, Memory

QUANTIZATIONS = ("float32", "int8")
FORBIDDEN = (BOS, PAD, MASK, EOS)
"""Words that no slot but the last may hold, see mask_predict_candidates."""
_EXAMPLE = {"B": 3, "K": 2, "S": 7, "T": 5}
"""Sizes that the programs are traced with; no two dimensions that may differ are equal, and none is 1."""


class Encode(nn.Module):
    """source (B, S) int64 -> states (B, S, D), length log-probabilities (B, L); float32."""

    def __init__(self, model: CMLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, source_BS: Tensor) -> tuple[Tensor, Tensor]:
        memory, logits_BL = self.model.encode(source_BS)
        return memory.states.contiguous(), logits_BL.log_softmax(-1)


class Decode(nn.Module):
    """states (B, S, D), source (B, S), tokens (B, K, T) -> words (B, K, T) int64, log-probabilities (B, K, T).

    One mask-predict pass over all K candidates: of every slot the most probable word that is not FORBIDDEN.
    """

    forbid: Tensor

    def __init__(self, model: CMLM) -> None:
        super().__init__()
        self.model = model
        forbid_V = torch.zeros(model.target_size)
        forbid_V[list(FORBIDDEN)] = float("-inf")
        self.register_buffer("forbid", forbid_V)

    def forward(self, states_BSD: Tensor, source_BS: Tensor, tokens_BKT: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.model.share(Memory(states_BSD, source_BS != PAD), tokens_BKT.shape[1])
        hidden_NTD = self.model.decode(memory, tokens_BKT.flatten(0, 1))
        logits_NTV = self.model.project(hidden_NTD)
        words_NT = (logits_NTV + self.forbid).argmax(-1)
        # onnxruntime's log-softmax takes half the time of its logsumexp
        values_NT = logits_NTV.log_softmax(-1).gather(-1, words_NT[..., None]).squeeze(-1)
        return words_NT.view_as(tokens_BKT), values_NT.view_as(tokens_BKT)


def require_exportable(loaded: LoadedModel) -> CMLM:
    """The student, if it can be written. Raises CheckpointError or VocabularyError that says why not."""
    model = loaded.model
    if not isinstance(model, CMLM):
        raise CheckpointError(
            f"a {model.kind} model cannot be written as ONNX, expected a CMLM student"
            + (": its LSTMs run over as many slots as each sentence has. " if model.kind == "tagger" else ". ")
            + ("Take --format ctranslate2." if model.kind == "transformer" else "Use engine_fast.load.")
        )
    for vocabulary in (loaded.source_vocabulary, loaded.target_vocabulary):
        if not isinstance(vocabulary, SentencePieceVocabulary | DictionaryVocabulary):
            raise VocabularyError(
                "a vocabulary imported with its own numbering cannot be exported: translate.py reads SentencePiece "
                "models and dictionaries. Use engine_fast.load."
            )
    return model


def export_onnx(
    to: Path,
    loaded: LoadedModel,
    *,
    readme: str,
    quantization: str = "float32",
    programs: Mapping[str, Any] | None = None,
) -> None:
    """Write `to`: encode.onnx, decode.onnx (see Encode and Decode; every size but D and V is free), the vocabularies
    and translate.py, which needs numpy, onnxruntime and sentencepiece.

    quantization: float32, or int8: weights of the matrix products stored in 8 bits, their inputs rounded as they come,
    by onnxruntime. programs: what trace_programs made of this model, to write it in several forms.
    An older export at `to` is replaced once the new one is whole.
    Raises CheckpointError (another kind of model), VocabularyError, ConfigError (onnx is not installed, unknown
    quantization), DataError (`to` cannot be written).
    """
    model = require_exportable(loaded)
    require(quantization in QUANTIZATIONS, "quantization", quantization, " or ".join(QUANTIZATIONS))
    with export_directory(
        to, loaded, form="onnx", readme=readme, quantization=quantization, refines=model.refines
    ) as fresh:
        for name, program in (programs or trace_programs(model)).items():
            _save(program, fresh / f"{name}.onnx", quantization)
        program_text = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
        (fresh / "translate.py").write_text(program_text, encoding="utf-8")


def trace_programs(model: CMLM) -> dict[str, Any]:
    """{"encode": .., "decode": ..}, torch.onnx's programs of Encode and Decode in float32. Raises ConfigError."""
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    return {"encode": _trace_encode(model), "decode": _trace_decode(model)}


def _dimensions(model: CMLM) -> dict[str, Any]:
    limits = {"B": 2**16, "K": model.max_positions, "S": model.max_positions, "T": model.max_positions}
    return {name: Dim(name, min=1, max=limit) for name, limit in limits.items()}


def _trace_encode(model: CMLM) -> Any:
    sizes, d = _EXAMPLE, _dimensions(model)
    source_BS = torch.full((sizes["B"], sizes["S"]), EOS)
    return _trace(Encode(model), (source_BS,), ({0: d["B"], 1: d["S"]},), ["source"], ["states", "lengths"])


def _trace_decode(model: CMLM) -> Any:
    sizes, d = _EXAMPLE, _dimensions(model)
    source_BS = torch.full((sizes["B"], sizes["S"]), EOS)
    states_BSD = torch.zeros(*source_BS.shape, model.architecture.width)
    tokens_BKT = torch.full((sizes["B"], sizes["K"], sizes["T"]), MASK)
    shapes = ({0: d["B"], 1: d["S"]}, {0: d["B"], 1: d["S"]}, {0: d["B"], 1: d["K"], 2: d["T"]})
    names = ["states", "source", "tokens"]
    return _trace(Decode(model), (states_BSD, source_BS, tokens_BKT), shapes, names, ["words", "scores"])


def _trace(module: nn.Module, example: Any, shapes: Any, inputs: list[str], outputs: list[str]) -> Any:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it says of every operator of torchvision that it is not installed
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module.eval(), example, dynamo=True, dynamic_shapes=shapes, input_names=inputs, output_names=outputs,
                verbose=False,
            )  # fmt: skip
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs the packages onnx, onnxscript and onnxruntime ({error}). "
            "pip install 'engine-fast[onnx]'."
        ) from error
    finally:
        logger.setLevel(level)


def _save(program: Any, path: Path, quantization: str) -> None:
    if quantization == "float32":
        program.save(str(path), external_data=False)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / path.name
        program.save(str(whole), external_data=False)
        root = logging.getLogger()
        level = root.level
        try:
            root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
            quantize_dynamic(
                str(whole), str(path), weight_type=QuantType.QInt8, per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
        finally:
            root.setLevel(level)
