"""A transformer teacher in the layout of CTranslate2, whose engine then runs it without this project.

Both compute the same network: positions are written out as our table, the decoder starts from the end symbol, and the
end symbol is put behind every source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine_fast.config import Architecture
from engine_fast.data.symbols import BOS, EOS, UNK
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.errors import CheckpointError, ConfigError, VocabularyError, require
from engine_fast.inference.directory import export_directory
from engine_fast.models import LoadedModel, Transformer
from engine_fast.models.layers import DecoderLayer, EncoderLayer
from engine_fast.models.stacks import Stack

QUANTIZATIONS = ("float32", "int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16")
"""How CTranslate2 may store the weights; it can also convert float32 ones when it loads them (compute_type)."""


def require_exportable(loaded: LoadedModel) -> Transformer:
    """The teacher, if CTranslate2 has layers for it. Raises CheckpointError that says why not."""
    model = loaded.model
    if not isinstance(model, Transformer):
        raise CheckpointError(
            f"a {model.kind} model cannot be written for CTranslate2, expected a transformer teacher: "
            "it has no layers for the others. "
            + ("Take --format onnx." if model.kind == "cmlm" else "Use engine_fast.load.")
        )
    if model.right_to_left:
        raise CheckpointError(
            "a right-to-left teacher cannot be written for CTranslate2: its output would be in reverse. "
            "Export one that reads from left to right."
        )
    return model


def export_ctranslate2(to: Path, loaded: LoadedModel, *, readme: str, quantization: str = "float32") -> None:
    """Write `to`: model.bin, config.json and vocabularies of CTranslate2, and our vocabulary files to cut text with.

    quantization: one of QUANTIZATIONS, done by CTranslate2. An older export at `to` is replaced once the new one is
    whole. Raises CheckpointError (a model it has no layers for), VocabularyError (a piece twice), ConfigError (not
    installed, unknown quantization), DataError (`to` cannot be written).
    """
    model = require_exportable(loaded)
    require(quantization in QUANTIZATIONS, "quantization", quantization, f"one of {', '.join(QUANTIZATIONS)}")
    spec = make_spec(model, loaded.source_vocabulary, loaded.target_vocabulary)
    spec.validate()
    spec.optimize(quantization=None if quantization == "float32" else quantization)
    with export_directory(to, loaded, form="ctranslate2", readme=readme, quantization=quantization) as fresh:
        spec.save(str(fresh))


def make_spec(model: Transformer, source: Vocabulary, target: Vocabulary) -> Any:
    """ctranslate2's TransformerSpec with the teacher's weights in float32, copied."""
    try:
        from ctranslate2.specs import Activation, TransformerSpec
    except ImportError as error:
        raise ConfigError(
            f"--format ctranslate2 needs the package ctranslate2 ({error}). pip install 'engine-fast[ctranslate2]'."
        ) from error
    config = model.architecture
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.heads,
        pre_norm=config.norm == "pre",
        activation=Activation.RELU if config.activation == "relu" else Activation.GELU,
    )
    _fill_stack(spec.encoder, spec.encoder.embeddings[0], model.encoder, config)
    _fill_stack(spec.decoder, spec.decoder.embeddings, model.decoder, config)
    for layer_spec, layer in zip(spec.encoder.layer, model.encoder.layers, strict=True):
        assert isinstance(layer, EncoderLayer)
        _fill_layer(layer_spec, layer)
    for layer_spec, layer in zip(spec.decoder.layer, model.decoder.layers, strict=True):
        assert isinstance(layer, DecoderLayer)
        _fill_layer(layer_spec, layer)
        _fill_norm(layer_spec.attention.layer_norm, layer.cross_attention_norm)
        cross = layer.cross_attention
        for linear_spec, linear in zip(
            layer_spec.attention.linear, (cross.q_proj, cross.kv_proj, cross.out_proj), strict=True
        ):
            _fill_linear(linear_spec, linear)
    _fill_linear(spec.decoder.projection, model.output)
    spec.register_source_vocabulary(_pieces(source, "source"))
    spec.register_target_vocabulary(_pieces(target, "target"))
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = target.pieces([BOS, EOS, UNK])
    spec.config.decoder_start_token = target.pieces([model.start])[0]
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = config.norm_epsilon
    return spec


def _fill_stack(spec: Any, embeddings: Any, stack: Stack, config: Architecture) -> None:
    embeddings.weight = _array(stack.embedding.weight)
    spec.scale_embeddings = stack.scale
    spec.position_encodings.encodings = _array(stack.positions(0, config.max_positions))
    if isinstance(stack.final_norm, nn.LayerNorm):
        _fill_norm(spec.layer_norm, stack.final_norm)


def _fill_layer(spec: Any, layer: EncoderLayer) -> None:
    """What encoder and decoder layers share; CTranslate2 keeps a norm inside of the block that it stands at."""
    own = layer.self_attention
    _fill_norm(spec.self_attention.layer_norm, layer.self_attention_norm)
    for linear_spec, linear in zip(spec.self_attention.linear, (own.in_proj, own.out_proj), strict=True):
        _fill_linear(linear_spec, linear)
    _fill_norm(spec.ffn.layer_norm, layer.ffn_norm)
    _fill_linear(spec.ffn.linear_0, layer.ffn.expand)
    _fill_linear(spec.ffn.linear_1, layer.ffn.contract)


def _fill_norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _fill_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight = _array(linear.weight)
    if linear.bias is not None:
        spec.bias = _array(linear.bias)


def _array(weight: Tensor) -> Any:
    return weight.detach().to("cpu", torch.float32, copy=True).numpy()


def _pieces(vocabulary: Vocabulary, side: str) -> list[str]:
    pieces = vocabulary.pieces(range(len(vocabulary)))
    seen: set[str] = set()
    for piece in pieces:
        if piece in seen:
            raise VocabularyError(
                f"the {side} vocabulary holds {piece!r} twice, and CTranslate2 knows ids by their piece. "
                "It cannot be exported."
            )
        seen.add(piece)
    return pieces
