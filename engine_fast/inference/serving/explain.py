"""How a model came to a translation: length candidates, passes, the confidence of each token, the teacher's energy.

K length candidates, T target slots.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from engine_fast.data.symbols import EOS, PAD
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.decoding import mask_predict_candidates
from engine_fast.decoding.hypothesis import top
from engine_fast.decoding.mask_predict import predict_lengths
from engine_fast.energies.score import token_energies
from engine_fast.inference.serving.systems import Source, System, Wish
from engine_fast.models import Student

_BEGINS, _GOES_ON = "\u2581", "@@"


class Token(BaseModel):
    """A piece of text."""

    text: str
    joined: bool
    """Whether it goes on with the word of the piece before it."""
    probability: float | None = None
    """That its model gave it, in the pass that chose it; None for a source's piece."""
    energy: float | None = None
    """-log p under the teacher, in nats; None without a teacher."""
    predicted: bool = True
    """Whether this pass chose it; else it was kept from an earlier one."""
    repeated: bool = False
    """Whether it equals the piece before it."""


class Candidate(BaseModel):
    """One length that a student considered."""

    tokens: int
    """Pieces, without the end symbol."""
    probability: float
    """Of this length, as the student's encoder sees it."""
    score: float
    """What chose among them; higher is better: the average log-probability, or -energy per token (rerank)."""
    energy: float | None
    """Of the sentence under the teacher, in nats."""
    translation: str
    chosen: bool


class Explanation(BaseModel):
    """One sentence through one model."""

    model: str
    kind: str
    translation: str
    seconds: float
    """From pieces to text, by itself in a batch, without what only the explanation needs."""
    energy: float | None
    """-log p(translation | source) under the teacher in nats, the end symbol included."""
    source: list[Token]
    num_unknown: int
    """Source pieces that the vocabulary lacks."""
    truncated: bool
    """Whether the source was cut to the model's positions."""
    passes: list[list[Token]]
    """Of the chosen candidate, pass by pass; a teacher's are one list, chosen one token after another."""
    candidates: list[Candidate]
    """Best length first; empty for a teacher."""


@dataclass(frozen=True, slots=True)
class _Trace:
    passes: list[list[Token]]
    candidates: list[Candidate]
    energies: list[float] | None
    """Of the chosen tokens, the end symbol's last."""


@torch.no_grad()
def explain(system: System, wish: Wish, source: Source) -> Explanation:
    """Translate once against the clock, and once more with an observer."""
    start = time.perf_counter()
    translation = system.translate(wish, [source])[0]
    seconds = time.perf_counter() - start
    if len(source) == 1:
        trace = _Trace([[]], [], None)
    elif system.is_student:
        trace = _student(system, wish, source)
    else:
        trace = _teacher(system, source, translation.hypothesis.tokens)
    for token, energy in zip(trace.passes[-1], trace.energies or [], strict=False):  # the end symbol has no token
        token.energy = energy
    return Explanation(
        model=system.name,
        kind=system.loaded.model.kind,
        translation=translation.text,
        seconds=seconds,
        energy=None if trace.energies is None else sum(trace.energies),
        source=_tokens(system.loaded.source_vocabulary, source.row),
        num_unknown=source.num_unknown,
        truncated=source.truncated,
        passes=trace.passes,
        candidates=trace.candidates,
    )


def _teacher(system: System, source: Source, tokens: list[int]) -> _Trace:
    """Under the teacher itself a token's energy is the confidence that chose it."""
    energies = _energies(system, source, [tokens])
    confidences = None if energies is None else [math.exp(-energy) for energy in energies[0]]
    chosen = _tokens(system.loaded.target_vocabulary, tokens, confidences)
    return _Trace([chosen], [], None if energies is None else energies[0])


def _student(system: System, wish: Wish, source: Source) -> _Trace:
    model, vocabulary = system.loaded.model, system.loaded.target_vocabulary
    assert isinstance(model, Student)
    translator = system.translator_for(wish)
    source_BS = torch.tensor([source.row], device=next(model.parameters()).device)
    log_lengths_BL = model.lengths(source_BS)
    lengths_BK = predict_lengths(log_lengths_BL[:, : translator.max_positions + 1], translator.settings.length_beam)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    found = mask_predict_candidates(
        model,
        source_BS,
        iterations=translator.settings.iterations,
        lengths_BK=lengths_BK,
        observe=lambda _, *tensors: seen.append((tensors[0].clone(), tensors[1].clone(), tensors[2].clone())),
    )
    lengths = lengths_BK[0].tolist()
    rows = [row[:length] for row, length in zip(found.tokens[0].tolist(), lengths, strict=True)]
    energies = _energies(system, source, rows)
    scores_BK = found.averages
    if translator.rescore is not None and energies is not None:
        penalty = translator.settings.length_penalty
        scores_BK = scores_BK.new_tensor([[-sum(e) / len(e) ** penalty for e in energies]])
    best = int(top(scores_BK, 1)[1])
    passes = []
    for tokens_NT, values_NT, masked_NT in seen:
        chosen = (tensor[best, : lengths[best]].tolist() for tensor in (tokens_NT, values_NT.exp(), masked_NT))
        passes.append(_tokens(vocabulary, *chosen))
    candidates = [
        Candidate(
            tokens=length - 1,
            probability=float(log_lengths_BL[0, length].exp()),
            score=score,
            energy=None if energies is None else sum(energies[k]),
            translation=vocabulary.decode(rows[k]),
            chosen=k == best,
        )
        for k, (length, score) in enumerate(zip(lengths, scores_BK[0].tolist(), strict=True))
    ]
    return _Trace(passes, candidates, None if energies is None else energies[best])


def _energies(system: System, source: Source, rows: list[list[int]]) -> list[list[float]] | None:
    """Of each token of each row under the teacher, the end symbol's last; None without a teacher."""
    teacher = system.teacher
    if teacher is None:
        return None
    device = next(teacher.parameters()).device
    source_BS = torch.tensor([source.row], device=device)
    target_KT = torch.full((len(rows), max(map(len, rows))), PAD, device=device)
    for k, row in enumerate(rows):
        target_KT[k, : len(row)] = torch.tensor(row, device=device)
    energies_KT = token_energies(teacher, teacher.share(teacher.encode(source_BS), len(rows)), target_KT)
    return [energies[: len(row)] for energies, row in zip(energies_KT.tolist(), rows, strict=True)]


def _tokens(
    vocabulary: Vocabulary,
    ids: list[int],
    probabilities: list[float] | None = None,
    predicted: list[bool] | None = None,
) -> list[Token]:
    """The pieces as a reader sees them; the end symbol is left out.

    SentencePiece marks the pieces that begin a word, fairseq those that another one follows.
    """
    pieces = vocabulary.pieces(ids)
    begins = any(piece.startswith(_BEGINS) for piece in pieces)
    tokens = []
    for place, piece in enumerate(pieces):
        if ids[place] == EOS:
            continue
        follows = not piece.startswith(_BEGINS) if begins else pieces[place - 1].endswith(_GOES_ON)
        tokens.append(
            Token(
                text=piece.removeprefix(_BEGINS).removesuffix(_GOES_ON) or piece,
                joined=place > 0 and follows,
                probability=None if probabilities is None else probabilities[place],
                predicted=predicted is None or predicted[place],
                repeated=place > 0 and ids[place] == ids[place - 1],
            )
        )
    return tokens
