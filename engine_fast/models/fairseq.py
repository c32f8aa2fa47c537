"""Checkpoints of fairseq, and of the ENGINE and Mask-Predict forks of it, as models of this project.

What differs between the two worlds, and is undone here: names; q, k and v projections joined or apart; position
tables whose row for position i is i + padding id + 1; a CMLM's encoder norms and its `gamma` and `beta`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from engine_fast.config import Architecture
from engine_fast.data.symbols import NUM_SPECIAL, PAD
from engine_fast.data.vocabulary import DictionaryVocabulary
from engine_fast.errors import CheckpointError
from engine_fast.models.cmlm import CMLM
from engine_fast.models.store import save_model
from engine_fast.models.transformer import Transformer

Kind = Literal["transformer", "cmlm"]

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+?)[._](weight|bias|gamma|beta)")
_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_PARTS = {
    "self_attn.in_proj": "self_attention.in_proj",
    "self_attn.out_proj": "self_attention.out_proj",
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn.out_proj": "cross_attention.out_proj",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "ffn.expand",
    "fc2": "ffn.contract",
    "final_layer_norm": "ffn_norm",
}
_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
_TABLES = {
    "encoder.embed_tokens.weight": "encoder.embedding.weight",
    "decoder.embed_tokens.weight": "decoder.embedding.weight",
    "decoder.embed_out": "output.weight",
    "decoder.output_projection.weight": "output.weight",
    "encoder.embed_lengths.weight": "length_embedding.weight",
}
_STACK = re.compile(r"(encoder|decoder)\.(embed_positions|layer_norm)\.(weight|bias|gamma|beta)")
_BOOKKEEPING = re.compile(r"(encoder|decoder)\.(version|embed_positions\._float_tensor)")
_UNSUPPORTED = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "cross_self_attention",
    "embedding_only",
    "layernorm_embedding",
    "no_cross_attention",
    "no_dec_token_positional_embeddings",
    "no_enc_token_positional_embeddings",
    "no_token_positional_embeddings",
)
_MANY = 5


class _Meter:
    """Takes the place of fairseq's training meters, which old checkpoints carry and nobody needs."""


def rename_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under fairseq's names -> the same numbers under ours (a linear map: it also carries gradients over).

    Projections of q, k and v are joined (self-attention) or split (cross-attention) as ours are; rows of position
    tables up to the padding id are dropped. Raises CheckpointError that lists every name it does not know.
    """
    renamed: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, value in state.items():
        if _BOOKKEEPING.fullmatch(name):
            continue
        if name in _TABLES:
            renamed[_TABLES[name]] = value
        elif found := _STACK.fullmatch(name):
            stack, part, leaf = found.groups()
            if part == "layer_norm":
                renamed[f"{stack}.final_norm.{_LEAVES[leaf]}"] = value
            else:
                renamed[f"{stack}.positions.weight"] = value[PAD + 1 :]
        elif found := _LAYER.fullmatch(name):
            stack, index, part, leaf = found.groups()
            prefix, leaf = f"{stack}.layers.{index}", _LEAVES[leaf]
            if (norm := re.fullmatch(r"layer_norms\.(\d)", part)) and int(norm[1]) < len(_NORMS[stack]):
                part = _NORMS[stack][int(norm[1])]
            if part in _PARTS:
                renamed[f"{prefix}.{_PARTS[part]}.{leaf}"] = value
            elif part == "encoder_attn.in_proj":
                width = value.shape[0] // 3
                renamed[f"{prefix}.cross_attention.q_proj.{leaf}"] = value[:width]
                renamed[f"{prefix}.cross_attention.kv_proj.{leaf}"] = value[width:]
            elif part == "encoder_attn.q_proj":
                renamed[f"{prefix}.cross_attention.q_proj.{leaf}"] = value
            elif apart := re.fullmatch(r"(self_attn|encoder_attn)\.([qkv])_proj", part):
                joined = "self_attention.in_proj" if apart[1] == "self_attn" else "cross_attention.kv_proj"
                pieces.setdefault(f"{prefix}.{joined}.{leaf}", {})[apart[2]] = value
            else:
                unknown.append(name)
        else:
            unknown.append(name)
    for name, parts in pieces.items():
        wanted = "qkv" if "in_proj" in name else "kv"
        if set(parts) == set(wanted):  # a missing third is reported later as the joint tensor that is missing
            renamed[name] = torch.cat([parts[letter] for letter in wanted])
    if unknown:
        raise CheckpointError(
            f"fairseq checkpoint: {len(unknown)} tensors of a kind this importer does not know: {_some(unknown)}. "
            "It reads plain transformers and the ENGINE or Mask-Predict CMLM."
        )
    return renamed


def convert_state(
    state: Mapping[str, Tensor],
    kind: Kind | None = None,
    *,
    heads: int,
    max_positions: int | None = None,
    **switches: Any,
) -> tuple[Architecture, Transformer | CMLM]:
    """A fairseq state dict -> (architecture, model in eval mode).

    Args:
        kind: None = a CMLM where the state has length classes, else a transformer.
        heads: attention heads; no tensor's size tells.
        max_positions: needed where positions are sinusoidal; learned tables have their own size.
        switches: further fields of Architecture that no tensor tells (activation, scale_embedding, norm_epsilon,
            dropout ...), over the kind's defaults.
    Sizes, tying, norm placement and the kind of positions are read off the tensors. float64 stays, else float32.
    Raises CheckpointError: unknown or missing tensors, sizes that do not fit together.
    """
    tensors = rename_state(state)
    kind = kind or ("cmlm" if "length_embedding.weight" in tensors else "transformer")
    architecture = _infer(tensors, kind, heads, max_positions, switches)
    for stack in ("encoder", "decoder"):
        _require_table(tensors, f"{stack}.embedding.weight")
    tensors.setdefault("output.weight", tensors["decoder.embedding.weight"])
    sizes = [tensors[f"{stack}.embedding.weight"].shape[0] for stack in ("encoder", "decoder")]
    model = (CMLM if kind == "cmlm" else Transformer)(architecture, *sizes)
    expected = model.state_dict()
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        problems.append(f"{len(surplus)} without a place in a {kind}: {_some(surplus)}")
    misfits = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if misfits:
        problems.append(f"{len(misfits)} of another size: {_some(misfits)}")
    if problems:
        raise CheckpointError(
            f"fairseq checkpoint as a {kind} (names are ours): {'; '.join(problems)}. "
            "Is it of another kind, or cut short?"
        )
    model.to(torch.float64 if all(value.dtype == torch.float64 for value in tensors.values()) else torch.float32)
    model.load_state_dict(tensors)
    return architecture, model.eval()


def import_fairseq(
    checkpoint: Path, source_dict: Path, target_dict: Path, out: Path, kind: Kind | None = None
) -> Architecture:
    """Turn a checkpoint and its two dict.txt into the model directory `out`.

    The dictionaries may be with or without the <mask> symbol that a CMLM (and the teacher of one) has at id 4; the
    number of embedding rows tells. The model card records the checkpoint's name and the switches that were read.
    Raises CheckpointError: unreadable, unsupported features, sizes that do not fit; VocabularyError: bad dictionary.
    """
    state, args = read_checkpoint(checkpoint)
    kind = kind or ("cmlm" if "encoder.embed_lengths.weight" in state else "transformer")
    try:
        architecture, model = convert_state(state, kind, **_switches(args, kind))
        source = _dictionary(source_dict, model.source_size, "source")
        target = _dictionary(target_dict, model.target_size, "target")
        if architecture.tie == "all" and source.fingerprint != target.fingerprint:
            raise CheckpointError(
                f"the checkpoint ties source and target embeddings, but {source_dict.name} and {target_dict.name} "
                "differ. Give the joined dictionary for both sides."
            )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    save_model(
        out,
        model,
        source,
        target,
        card={"imported_from": checkpoint.name, "format": "fairseq", "arch": args.get("arch")},
    )
    return architecture


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, training arguments) of a fairseq checkpoint; no code in the file is ever run.

    Arguments are `args` (a Namespace) or the model section of `cfg`.
    """
    meters = [(_Meter, f"fairseq.meters.{name}") for name in ("AverageMeter", "TimeMeter", "StopwatchMeter")]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *meters]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file. Give a fairseq checkpoint (.pt).") from error
    except Exception as error:  # damaged bytes surface as almost any exception
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path}: holds an object of type {refused[1]}, which is not loaded from untrusted files. Where that "
                "package is installed, save it again as {'model': state dict, 'args': Namespace of plain values}."
            ) from error
        raise CheckpointError(
            f"{path}: not a readable torch checkpoint ({type(error).__name__}). Fetch it again."
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: expected a dictionary whose 'model' is a state dict; this is no fairseq checkpoint."
        )
    config = content.get("cfg")
    args = config.get("model") if isinstance(config, dict) else content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, dict):
        raise CheckpointError(f"{path}: holds neither 'args' nor 'cfg', so heads and activation are unknown.")
    return dict(state), dict(args)


def _switches(args: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The fields of Architecture that no tensor tells, from fairseq's arguments."""
    if used := [name for name in _UNSUPPORTED if args.get(name)]:
        raise CheckpointError(
            f"fairseq option {used[0]} = {args[used[0]]!r}, expected it unused: no model here has it."
        )

    def both(name: str, default: Any = None) -> Any:
        encoder, decoder = args.get(f"encoder_{name}", default), args.get(f"decoder_{name}", default)
        if encoder is None or encoder != decoder:
            raise CheckpointError(
                f"encoder_{name} = {encoder!r}, decoder_{name} = {decoder!r}, expected one value for both."
            )
        return encoder

    both("normalize_before", False)
    switches: dict[str, Any] = {
        "heads": both("attention_heads"),
        "dropout": args.get("dropout", 0.1),
        "attention_dropout": args.get("attention_dropout") or 0.0,
        "activation_dropout": args.get("activation_dropout") or args.get("relu_dropout") or 0.0,
    }
    if kind == "transformer":
        activation = args.get("activation_fn") or "relu"
        if activation not in ("relu", "gelu"):
            raise CheckpointError(f"activation_fn = {activation!r}, expected relu or gelu (the erf form).")
        limits = [args.get(f"max_{side}_positions") or 1024 for side in ("source", "target")]
        switches |= {
            "activation": activation,
            "scale_embedding": not args.get("no_scale_embedding"),
            "max_positions": None if both("learned_pos", False) else min(limits),
        }
    return switches


def _infer(
    tensors: Mapping[str, Tensor], kind: Kind, heads: int, max_positions: int | None, switches: Mapping[str, Any]
) -> Architecture:
    embedding = _require_table(tensors, "encoder.embedding.weight")
    decoder_embedding = _require_table(tensors, "decoder.embedding.weight")
    expand = _require_table(tensors, "encoder.layers.0.ffn.expand.weight")
    positions = tensors.get("encoder.positions.weight")
    if positions is not None:
        if max_positions not in (None, positions.shape[0]):
            raise CheckpointError(f"max_positions = {max_positions}, but the learned table has {positions.shape[0]}.")
        max_positions = positions.shape[0]
    if max_positions is None:
        raise CheckpointError("max_positions is not given, and sinusoidal positions have no table that tells.")
    output = tensors.get("output.weight", decoder_embedding)
    tie = "none"
    if torch.equal(output, decoder_embedding):
        tie = "all" if torch.equal(embedding, decoder_embedding) else "decoder"
    fields: dict[str, Any] = {
        "width": embedding.shape[1],
        "ffn_width": expand.shape[0],
        "heads": heads,
        "encoder_layers": _depth(tensors, "encoder"),
        "decoder_layers": _depth(tensors, "decoder"),
        "norm": "pre" if "decoder.final_norm.weight" in tensors else "post",
        "positions": "sinusoidal" if positions is None else "learned",
        "max_positions": max_positions,
        "tie": tie,
    }
    if kind == "cmlm":
        fields |= {"norm_epsilon": 1e-12, "activation": "gelu", "scale_embedding": False, "init": "normal"}
    try:
        return Architecture(**(fields | dict(switches)))
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}" for item in error.errors())
        raise CheckpointError(f"fairseq checkpoint: its sizes make no architecture: {details}.") from error


def _dictionary(path: Path, size: int, side: str) -> DictionaryVocabulary:
    plain = DictionaryVocabulary.load(path, mask=False)
    if len(plain) == size:
        return plain
    if len(plain) + 1 == size:
        return DictionaryVocabulary.load(path, mask=True)
    raise CheckpointError(
        f"the {side} embedding has {size} rows, but {path} makes {len(plain)} symbols ({NUM_SPECIAL - 1} special), or "
        f"{len(plain) + 1} with <mask>. Give the dict.txt this checkpoint was trained with."
    )


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = {int(found[1]) for name in tensors if (found := re.match(rf"{stack}\.layers\.(\d+)\.", name))}
    return max(indices, default=-1) + 1


def _require_table(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors or tensors[name].ndim != 2:
        raise CheckpointError(f"fairseq checkpoint: no tensor for {name} (our name). Is it a transformer, and whole?")
    return tensors[name]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_MANY]) + (", ..." if len(names) > _MANY else "")
