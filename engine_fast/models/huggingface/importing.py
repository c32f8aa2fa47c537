"""From a directory of Hugging Face, or a name on its hub, to a model directory of ours."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine_fast.data.pieces import PieceVocabulary
from engine_fast.data.symbols import PAD
from engine_fast.errors import CheckpointError, EngineFastError, VocabularyError
from engine_fast.models.huggingface import contract, tokens
from engine_fast.models.huggingface.network import HuggingFaceArchitecture, HuggingFaceTeacher, require_transformers
from engine_fast.models.huggingface.renumber import LACKING, renumber
from engine_fast.models.store import load_unique_state, save_model, unique_state

_RELATIVE_POSITIONS = 512
"""Longest side of a model whose positions are relative and whose tokenizer names no limit."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which model, and how it is asked."""

    path: str
    """A directory, or a name on the hub."""
    revision: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    prompt: str = ""

    def fetch(self, name: str) -> str | None:
        """The path of one of its files, None where it has no such file."""
        if os.path.isdir(self.path):
            path = os.path.join(self.path, name)
            return path if os.path.isfile(path) else None
        with _explained(self):
            return require_transformers().utils.cached_file(  # type: ignore[no-any-return]
                self.path, name, revision=self.revision, _raise_exceptions_for_missing_entries=False
            )


def import_huggingface(origin: Origin, out: Path) -> HuggingFaceArchitecture:
    """Check a model against the contract and write it, in our order of ids, as the model directory `out`.

    Needs memory for its weights in float64, twice. No code that came with the model is run, and no pickle that holds
    more than tensors is read.
    Raises CheckpointError: not reachable, incomplete, a network that cannot teach; VocabularyError: a tokenizer that
    cannot be reproduced, or that does not fit the weights; ConfigError: a language that is missing or unknown.
    """
    teacher, source, target = load_huggingface(origin)
    card = {"imported_from": origin.path, "format": "huggingface", "revision": origin.revision}
    save_model(out, teacher, source, target, card=card)
    architecture: HuggingFaceArchitecture = teacher.architecture
    return architecture


def read_vocabularies(origin: Origin) -> tuple[PieceVocabulary, PieceVocabulary]:
    """Those that the model's directory will have, without reading its weights."""
    transformers = require_transformers()
    with _explained(origin), _quietly(transformers):
        config = _config(transformers, origin)
        tokenizer = _tokenizer(transformers, origin)
    rows = config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size
    source, target = _sides(tokenizer, origin, rows)
    return source.vocabulary, target.vocabulary


def load_huggingface(origin: Origin) -> tuple[HuggingFaceTeacher, PieceVocabulary, PieceVocabulary]:
    """The checked teacher, float32 and in eval mode, and its vocabularies. Raises as import_huggingface."""
    transformers = require_transformers()
    with _explained(origin), _quietly(transformers):
        config = _config(transformers, origin)
        network = _network(transformers, origin, config)
        tokenizer = _tokenizer(transformers, origin)
    contract.check_interface(network, origin.path)
    rows = (len(stack.get_input_embeddings().weight) for stack in (network.get_encoder(), network.get_decoder()))
    source, target = _sides(tokenizer, origin, (next(rows), next(rows)))
    with _quietly(transformers):
        layout = _layout(network, tokenizer, source, target, origin)
    teacher = _carried_over(network, layout, source, target, origin)
    return teacher.float(), source.vocabulary, target.vocabulary


def _layout(
    network: Any, tokenizer: Any, source: tokens.Side, target: tokens.Side, origin: Origin
) -> HuggingFaceArchitecture:
    """What stands around sentences, in our ids; the network itself is left out."""
    name = origin.path
    asked = tokens.languages(tokenizer, source, origin.source_language, origin.target_language, name) + origin.prompt
    prefix, suffix = tokens.frame(tokenizer, source, prompt=asked, target=False, origin=name)
    before, after = tokens.frame(tokenizer, target, prompt="", target=True, origin=name)
    prompt = _decoder_prompt(network, target, before, after, origin)
    return HuggingFaceArchitecture(
        network={}, generation={}, source_prefix=prefix, source_suffix=suffix, target_prefix=prompt[:-1],
        start=prompt[-1],
        max_positions=_positions(network.config, tokenizer) - max(len(prefix) + len(suffix), len(prompt)) + 1,
    )  # fmt: skip


def _carried_over(
    network: Any, layout: HuggingFaceArchitecture, source: tokens.Side, target: tokens.Side, origin: Origin
) -> HuggingFaceTeacher:
    """The teacher, float64 and frozen, once it has been seen to do what the network did. The network is used up."""
    network.double().requires_grad_(False).eval()
    sizes = len(source.rows), len(target.rows)
    source_BS, target_BT = (
        contract.probe_ids(list(_words(side)), longest=min(9, layout.max_positions - 1)) for side in (source, target)
    )
    framed = HuggingFaceTeacher(layout, *sizes, network).frame(source_BS)
    prompt = [*layout.target_prefix, layout.start]
    expected, scales = _original(network, framed, target_BT, prompt, source, target)
    renumber(network, source.rows, target.rows, prompt=prompt)
    architecture = layout.model_copy(
        update={
            "network": json.loads(network.config.to_json_string(use_diff=False)),
            "generation": json.loads(network.generation_config.to_json_string(use_diff=False)),
            "embedding_scale": scales[0],
            "hidden_scale": scales[1],
        }
    )
    teacher = _rebuilt(architecture, HuggingFaceTeacher(architecture, *sizes, network))
    contract.check_contract(teacher, source_BS, target_BT, expected, origin.path)
    return teacher


def _config(transformers: Any, origin: Origin) -> Any:
    if os.path.isdir(origin.path) and not os.path.isfile(os.path.join(origin.path, "config.json")):
        raise CheckpointError(f"{origin.path}: no config.json here. Give a model's directory, or its name on the hub.")
    config = transformers.AutoConfig.from_pretrained(origin.path, revision=origin.revision)
    if not config.is_encoder_decoder:
        names = config.architectures or []
        kind = getattr(transformers, names[0], None) if names else None
        writes = kind is not None and kind.can_generate()
        raise CheckpointError(
            contract.lacking(
                origin.path, names[0] if names else config.model_type, "get_encoder()" if writes else "generate()"
            )
        )
    return config


def _network(transformers: Any, origin: Origin, config: Any) -> Any:
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else a thread asks the hub for another format
    network, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        origin.path, revision=origin.revision, config=config, dtype=torch.float32, output_loading_info=True
    )
    absent = sorted(report["missing_keys"])
    if absent or report["mismatched_keys"]:
        wrong = ", ".join([*absent, *map(str, report["mismatched_keys"])][:5])
        raise CheckpointError(f"{origin.path}: tensors are missing or of another size: {wrong}. Fetch it again.")
    return network


def _tokenizer(transformers: Any, origin: Origin) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(origin.path, revision=origin.revision)
    except TypeError as error:  # it opens a file that it was told is not there
        settings = _json(origin.fetch("tokenizer_config.json"))
        kind = str(settings.get("tokenizer_class"))
        names = {*dict(getattr(getattr(transformers, kind, None), "vocab_files_names", {})).values()}
        optional = {"tokenizer.json", "tokenizer_config.json"}
        optional |= set() if settings.get("separate_vocabs") else {"target_vocab.json"}
        absent = sorted(name for name in names - optional if origin.fetch(name) is None)
        if not absent:
            raise
        told = f"{origin.path}: {', '.join(absent)} missing, which its {kind} reads. Fetch it again."
        raise CheckpointError(told) from error
    if hasattr(tokenizer, "punc_normalizer"):
        # Marian's, where sacremoses happens to be installed: text would depend on what else is on the machine.
        tokenizer.punc_normalizer = str
    return tokenizer


def _json(path: str | None) -> dict[str, Any]:
    """A file's object; {} where there is none."""
    found = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _sides(tokenizer: Any, origin: Origin, sizes: tuple[int, int]) -> tuple[tokens.Side, tokens.Side]:
    if getattr(tokenizer, "separate_vocabs", None) is False and origin.fetch("target_vocab.json"):
        raise VocabularyError(
            f"{origin.path}: has a target_vocab.json, but its tokenizer_config.json does not say that it is used. Add "
            '"separate_vocabs": true there, or take the file away.'
        )
    models = tokens.find_models(tokenizer, origin.fetch, origin.path)
    return tokens.read_sides(tokenizer, models, sizes, origin.path)


def _decoder_prompt(
    network: Any, target: tokens.Side, before: list[int], after: list[int], origin: Origin
) -> list[int]:
    """What the decoder reads before the first word, in our ids: the start symbol, and a language code if any.

    mBART's first form writes its labels as `words EOS code` and starts with the code itself.
    """
    settings = network.generation_config, network.config
    start, forced = (
        next((row for one in settings if (row := getattr(one, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    if len(after) > 1:
        return [after[1]]
    if start is None:
        raise CheckpointError(f"{origin.path}: its configuration has no decoder_start_token_id, expected one. Add it.")
    if not before and forced is not None:
        before = [target.ours[forced]]
    return [target.ours[start], *before]


def _positions(config: Any, tokenizer: Any) -> int:
    found = getattr(config, "max_position_embeddings", None)
    return int(found or min(tokenizer.model_max_length, _RELATIVE_POSITIONS))


def _words(side: tokens.Side) -> Iterator[int]:
    for number, piece in enumerate(side.vocabulary.pieces(range(len(side.vocabulary)))):
        if number > 4 and side.vocabulary.decode([number]) and not piece.startswith("<"):
            yield number


def _original(
    network: Any, framed_BS: Tensor, target_BT: Tensor, prompt: list[int], source: tokens.Side, target: tokens.Side
) -> tuple[Tensor, tuple[float, float]]:
    """The untouched network's logits for our ids, in our order, NaN where it lacks a symbol; and its scales."""
    source_rows, target_rows = (torch.tensor(side.rows) for side in (source, target))
    inputs_BT = torch.cat([target_BT.new_tensor(prompt).expand(len(target_BT), -1), target_BT[:, :-1]], dim=1)
    mask_BS = framed_BS != PAD
    theirs_BS = source_rows[framed_BS].clamp(min=0)
    theirs_BT = target_rows[inputs_BT].clamp(min=0)
    logits = contract.reference_logits(network, theirs_BS, theirs_BT, mask_BS)[:, len(prompt) - 1 :]
    expected = logits[..., target_rows.clamp(min=0)]
    expected[..., target_rows == LACKING] = float("nan")
    longest = mask_BS.all(1)
    return expected, contract.find_scales(network, theirs_BS[longest], theirs_BT[longest])


def _rebuilt(architecture: HuggingFaceArchitecture, teacher: HuggingFaceTeacher) -> HuggingFaceTeacher:
    """The same teacher as load_model() will make it: what it keeps besides its weights comes from its settings."""
    fresh = HuggingFaceTeacher(architecture, teacher.source_size, teacher.target_size)
    fresh.double().requires_grad_(False).eval()
    load_unique_state(fresh, unique_state(teacher), "the renumbered network")
    return fresh


@contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Whatever goes wrong while transformers reads files, as one error of ours."""
    try:
        yield
    except EngineFastError:
        raise
    except Exception as error:  # a damaged file surfaces as almost any exception
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        if "look at the above report" in first:
            first = "its weights are not those of the network in its config.json"
        if "weights_only" in text or "WeightsUnpickler" in text or "pickle" in text.lower():
            raise CheckpointError(
                f"{origin.path}: its weights are a pickle that holds more than tensors, which is not loaded from "
                "untrusted files. Take its model.safetensors, or save its state dict again."
            ) from error
        if os.path.isdir(origin.path):
            raise CheckpointError(
                f"{origin.path}: cannot be read as a Hugging Face model ({first}). Is every file there, and whole?"
            ) from error
        raise CheckpointError(
            f"{origin.path}: neither a directory here, nor found on the Hugging Face hub ({first}). Check the name and "
            "the network, or download the model elsewhere and give its directory."
        ) from error


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and advice: what matters is raised."""
    level, hub = transformers.logging.get_verbosity(), logging.getLogger("huggingface_hub")
    hub_level = hub.level
    transformers.logging.set_verbosity(logging.CRITICAL)
    hub.setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        hub.setLevel(hub_level)
