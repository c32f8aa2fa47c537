"""A tokenizer of Hugging Face as vocabularies of ours, and what it puts around a sentence.

Ours is the order of ids (engine_fast.data.symbols, then its own); the cutting of text is its SentencePiece model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine_fast.data.pieces import PieceVocabulary
from engine_fast.data.symbols import EOS, NUM_SPECIAL, UNK
from engine_fast.data.vocabulary_parts import SYMBOLS
from engine_fast.errors import ConfigError, VocabularyError
from engine_fast.models.huggingface.renumber import LACKING

_MODELS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt \u00fcber den faulen Hund.",
    "It costs 3.50, doesn't it? (Yes: 12%!)",
    "\u00c0 l'\u00e9cole, o\u00f9 est-ce que c'est \u00e9crit?",
)
_FEW = 6


@dataclass(frozen=True, slots=True)
class Side:
    """One language of a model."""

    vocabulary: PieceVocabulary
    rows: list[int]
    """Its own id of each of ours, LACKING where it has none."""

    @property
    def ours(self) -> dict[int, int]:
        """Its own id -> ours."""
        return {row: number for number, row in enumerate(self.rows) if row != LACKING}


def read_sides(tokenizer: Any, models: tuple[bytes, bytes], sizes: tuple[int, int], origin: str) -> tuple[Side, Side]:
    """Source and target; one object where they are one.

    Args: models: the SentencePiece models of both sides. sizes: rows of the two tables of embeddings.
    Raises VocabularyError: more pieces than rows, no end symbol, files that do not belong together.
    """
    apart = getattr(tokenizer, "separate_vocabs", False)
    if apart:
        lists = tokenizer.encoder, tokenizer.target_encoder
        source, target = (
            _side(tokenizer, *each, origin, apart=True) for each in zip(lists, models, sizes, strict=True)
        )
        return source, target
    source = _side(tokenizer, tokenizer.get_vocab(), models[0], sizes[0], origin)
    if models[0] == models[1] and sizes[0] == sizes[1]:
        return source, source
    return source, _side(tokenizer, tokenizer.get_vocab(), models[1], sizes[1], origin)


def find_models(tokenizer: Any, fetch: Any, origin: str) -> tuple[bytes, bytes]:
    """The SentencePiece models of source and target; fetch(name) is the path of a file of the model, or None.

    Raises VocabularyError where there is none.
    """
    found = getattr(tokenizer, "spm_files", None) or [getattr(tokenizer, "spm_file", None)] * 2
    if not all(found):
        names = [name for name in tokenizer.vocab_files_names.values() if name.endswith((".model", ".spm"))]
        path = next((path for name in dict.fromkeys([*names, *_MODELS]) if (path := fetch(name))), None)
        if path is None:
            raise VocabularyError(
                f"{origin}: its {type(tokenizer).__name__} comes without a SentencePiece model, expected one of "
                f"{', '.join(dict.fromkeys([*names, *_MODELS]))}. Put the file beside it, or take a model that has one."
            )
        found = [path, path]
    return Path(found[0]).read_bytes(), Path(found[1]).read_bytes()


def languages(tokenizer: Any, side: Side, source: str | None, target: str | None, origin: str) -> str:
    """Tell the tokenizer the two languages; returns what goes in front of every source text instead, or "".

    Raises ConfigError: a language that the model needs or does not know; one given to a model without languages.
    """
    names = set(side.vocabulary.pieces(range(NUM_SPECIAL, len(side.vocabulary))))
    codes = sorted(name[2:-2] for name in names if name.startswith(">>") and name.endswith("<<"))  # Marian's
    if codes:
        if target is None or f">>{target}<<" not in names:
            _refuse("target", target, codes, origin)
        if source is not None:
            raise ConfigError(f"{origin}: source_language = {source!r}, but this model reads any: leave it out.")
        return f">>{target}<< "
    if not hasattr(tokenizer, "src_lang"):
        for which, code in (("source", source), ("target", target)):
            if code is not None:
                raise ConfigError(
                    f"{origin}: {which}_language = {code!r}, but this model knows one pair: leave it out."
                )
        return ""
    special = (token for token in tokenizer.all_special_tokens if token not in SYMBOLS)
    known = {*getattr(tokenizer, "lang_code_to_id", {}), *special}
    for which, code in (("source", source), ("target", target)):
        if code is None or code not in known:
            _refuse(which, code, sorted(known), origin)
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    return ""


def frame(tokenizer: Any, side: Side, *, prompt: str, target: bool, origin: str) -> tuple[list[int], list[int]]:
    """(prefix, suffix) that the tokenizer puts around a sentence, in our ids.

    Found on lines of its own words and on a few others; on each of them its ids have to be prefix + ours + suffix,
    and ours have to read as the same text. Raises VocabularyError naming the first line that differs.
    """
    vocabulary, ours = side.vocabulary, side.ours
    found: tuple[list[int], list[int]] | None = None
    for line in (*vocabulary.sample_lines(), *_PROBES):
        text = {"text_target": line} if target else {"text": prompt + line}
        theirs = _merge([ours[row] for row in tokenizer(**text)["input_ids"]])
        own = _merge(vocabulary.encode(line))
        if found is None:
            found = _around(theirs, own)
        if found is None or theirs != [*found[0], *own, *found[1]]:
            raise VocabularyError(
                f"{origin}: the {'target' if target else 'source'} line {line!r} becomes {vocabulary.pieces(theirs)} "
                f"in its {type(tokenizer).__name__}, but {vocabulary.pieces(own)} here. Its text handling cannot be "
                "reproduced from the SentencePiece model alone: take a model without it."
            )
        if UNK not in own and vocabulary.decode(own) != vocabulary.surface(line):
            raise VocabularyError(
                f"{origin}: {line!r} does not round-trip: its ids read as {vocabulary.decode(own)!r}. "
                "The list of pieces and the SentencePiece model do not fit together."
            )
    assert found is not None, "there are always probes"
    return found


def _side(
    tokenizer: Any, numbers: dict[str, int], model: bytes, size: int, origin: str, *, apart: bool = False
) -> Side:
    """apart: of a tokenizer with a list of pieces for each side. What it says of symbols is true of the source."""
    if max(numbers.values()) >= size:
        raise VocabularyError(
            f"{origin}: the tokenizer's ids go up to {max(numbers.values())}, but the table of embeddings has {size} "
            "rows. Tokenizer and weights belong to different models."
        )
    symbols = {
        "<s>": "bos_token",
        "<pad>": "pad_token",
        "</s>": "eos_token",
        "<unk>": "unk_token",
        "<mask>": "mask_token",
    }
    own: dict[str, int | None]
    if apart:
        named = {symbol: getattr(tokenizer, name, None) for symbol, name in symbols.items()}
        own = {symbol: None if name is None else numbers.get(name) for symbol, name in named.items()}
        special = {row for name in tokenizer.all_special_tokens if (row := numbers.get(name)) is not None}
    else:
        own = {symbol: getattr(tokenizer, f"{name}_id", None) for symbol, name in symbols.items()}
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    own["<s>"] = numbers.get("<s>") if own["<s>"] is None else own["<s>"]
    if own["</s>"] is None or own["<unk>"] is None:
        raise VocabularyError(f"{origin}: its tokenizer has no end symbol or no unknown one, expected both: {own}.")
    symbol_rows: dict[str, int] = {}
    for symbol in ("</s>", "<unk>", "<pad>", "<s>", "<mask>"):  # a row that serves twice goes to the first
        row = own[symbol]
        symbol_rows[symbol] = LACKING if row is None or row in symbol_rows.values() else row
    rows = [symbol_rows[symbol] for symbol in SYMBOLS]
    taken = set(rows)
    rows += [row for row in range(size) if row not in taken]
    pieces_of = {number: piece for piece, number in numbers.items()}
    pieces, silent = list(SYMBOLS), []
    for row in rows[NUM_SPECIAL:]:
        piece = pieces_of.get(row)
        if piece is None or row in special or (piece.startswith(">>") and piece.endswith("<<")):
            silent.append(len(pieces))
        if piece is None:
            piece = f"<row {row}>" if apart else _name(tokenizer, row)
        pieces.append(piece)
    return Side(PieceVocabulary(model, pieces, silent, origin=origin), rows)


def _name(tokenizer: Any, row: int) -> str:
    """Of a row that the list of pieces does not name: M2M100 keeps its languages elsewhere; some rows are padding."""
    found = tokenizer.convert_ids_to_tokens(row)
    return f"<row {row}>" if found in (None, tokenizer.unk_token) else str(found)


def _merge(ids: Sequence[int]) -> list[int]:
    """Neighbouring unknown ids as one: tokenizers differ in how many of them they make."""
    return [one for place, one in enumerate(ids) if one != UNK or not place or ids[place - 1] != UNK]


def _around(theirs: list[int], own: list[int]) -> tuple[list[int], list[int]] | None:
    for start in range(len(theirs) - len(own) + 1):
        if theirs[start : start + len(own)] == own and EOS in theirs[start + len(own) :]:
            return theirs[:start], theirs[start + len(own) :]
    return None


def _refuse(which: str, code: str | None, known: list[str], origin: str) -> None:
    near = get_close_matches(code or "", known, _FEW, 0.3)
    known = [*near, *(each for each in known if each not in near)]
    some = ", ".join(known[:_FEW]) + (", ..." if len(known) > _FEW else "")
    got = f"{which}_language = {code!r}" if code is not None else f"no {which}_language is given"
    raise ConfigError(f"{origin}: {got}, and this model knows many: choose one of {some}.")
