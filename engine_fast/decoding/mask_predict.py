"""Mask-predict: all slots of a guessed length filled at once, then the doubtful ones again (Ghazvininejad et al. 2019).

B sentences, K length candidates, N = B * K rows, S source positions, T target slots, L length classes, R masked slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine_fast import ops
from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.decoding.hypothesis import Hypothesis, score_dtype, top
from engine_fast.errors import require
from engine_fast.models import Student

Rescore = Callable[[Tensor, Tensor], Tensor]
"""(source (B, S), target (B * K, T): K adjacent candidates of each source) -> (B * K,) energies in nats; lower is
better. energies.discrete_energy of a teacher is one: all candidates in one parallel pass (noisy parallel decoding)."""

Observe = Callable[[int, Tensor, Tensor, Tensor], None]
"""(pass from 0, tokens (N, T), log-probabilities (N, T) in nats, masked (N, T)), called after each pass. `masked` are
the slots that the pass predicted; the others keep what they had. The next pass overwrites the tensors: copy them."""

MIN_LENGTH = 2
"""One word and EOS."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One translation per sentence and length candidate."""

    tokens: Tensor
    """(B, K, T) ids, right padded with PAD."""
    log_probabilities: Tensor
    """(B, K) sums of the predicted tokens' log-probabilities, each from the pass that chose the token; nats."""
    lengths: Tensor
    """(B, K) slots, the last one (EOS) included."""
    num_predicted: Tensor
    """(B, K) slots that were predicted: lengths, less one where the end is forced."""

    @property
    def averages(self) -> Tensor:
        """(B, K) log-probability per predicted token: what chooses among lengths."""
        return self.log_probabilities / self.num_predicted


@torch.no_grad()
def mask_predict(
    model: Student,
    source_BS: Tensor,
    *,
    iterations: int = 1,
    length_beam: int = 1,
    lengths: Tensor | None = None,
    max_length: int | None = None,
    rescore: Rescore | None = None,
    length_penalty: float = 1.0,
    force_end: bool = True,
) -> list[Hypothesis]:
    """The best length candidate of every sentence; see mask_predict_n_best."""
    ranked = mask_predict_n_best(
        model,
        source_BS,
        iterations=iterations,
        length_beam=length_beam,
        lengths=lengths,
        max_length=max_length,
        rescore=rescore,
        length_penalty=length_penalty,
        force_end=force_end,
    )
    return [hypotheses[0] for hypotheses in ranked]


@torch.no_grad()
def mask_predict_n_best(
    model: Student,
    source_BS: Tensor,
    *,
    iterations: int = 1,
    length_beam: int = 1,
    lengths: Tensor | None = None,
    max_length: int | None = None,
    rescore: Rescore | None = None,
    length_penalty: float = 1.0,
    force_end: bool = True,
) -> list[list[Hypothesis]]:
    """All length candidates, decoded in parallel, best first.

    Args: source_BS: ids ending in EOS, right padded. lengths: (B,) known target lengths, EOS included; the candidates
        are then the length_beam lengths around them, else the length_beam most probable ones.
        max_length: longest candidate; default, and at most, the model's positions.
        rescore: judges the candidates by -energy / length**length_penalty (length counts EOS, as in beam_search)
        instead of by their average token log-probability.
    Returns: per sentence, hypotheses whose score is what ranked them. No gradients.
    """
    require(iterations >= 1, "iterations", iterations, "at least 1")
    require(length_beam >= 1, "length_beam", length_beam, "at least 1")
    if not source_BS.shape[0]:
        return []
    positions = model.max_positions
    max_length = positions if max_length is None else min(max_length, positions)
    require(max_length >= MIN_LENGTH, "max_length", max_length, f"at least {MIN_LENGTH}")
    memory, logits_BL = model.encode(source_BS)
    if lengths is None:
        lengths_BK = predict_lengths(logits_BL[:, : max_length + 1], length_beam)
    else:
        lengths_BK = lengths_around(lengths.to(source_BS.device), length_beam, max_length)
    found = _decode(model, memory, iterations=iterations, lengths_BK=lengths_BK, force_end=force_end)
    scores_BK = found.averages
    if rescore is not None:
        energies_BK = rescore(source_BS, found.tokens.flatten(0, 1)).view_as(scores_BK)
        scores_BK = -energies_BK / found.lengths.to(energies_BK.dtype) ** length_penalty
    scores_BK, order_BK = top(scores_BK, scores_BK.shape[1])
    ranked: list[list[Hypothesis]] = []
    for b, (scores, order) in enumerate(zip(scores_BK.tolist(), order_BK.tolist(), strict=True)):
        rows = found.tokens[b].tolist()
        sizes, values = found.lengths[b].tolist(), found.log_probabilities[b].tolist()
        ranked.append(
            [Hypothesis(rows[k][: sizes[k]], score, values[k]) for score, k in zip(scores, order, strict=True)]
        )
    return ranked


@torch.no_grad()
def mask_predict_candidates(
    model: Student,
    source_BS: Tensor,
    *,
    iterations: int = 1,
    lengths_BK: Tensor,
    force_end: bool = True,
    observe: Observe | None = None,
) -> Candidates:
    """Fill every candidate length of every sentence.

    Pass 0 predicts all n slots. Pass t masks the floor(n (1 - t / iterations)) least probable ones (at least one)
    and predicts them again; the others keep their token and the probability it was chosen with.

    force_end: the last slot reads MASK in pass 0, as in training, and is EOS from then on, because ENGINE's student
    gets no energy gradient there; it is not counted in n, and no other slot may hold BOS, PAD, MASK or EOS.
    False: the last slot is predicted like any other and nothing is forbidden, as in the authors' code.
    observe: told of every pass, row b * K + k being candidate k of sentence b.
    """
    memory, _ = model.encode(source_BS)
    return _decode(model, memory, iterations=iterations, lengths_BK=lengths_BK, force_end=force_end, observe=observe)


def predict_lengths(logits_BL: Tensor, num_candidates: int) -> Tensor:
    """(B, K) most probable lengths, best first, EOS included; at least MIN_LENGTH, no length twice."""
    allowed_BL = logits_BL[:, MIN_LENGTH:]
    return top(allowed_BL, min(num_candidates, allowed_BL.shape[1]))[1] + MIN_LENGTH


def lengths_around(lengths_B: Tensor, num_candidates: int, max_length: int) -> Tensor:
    """(B, K) lengths - (K - 1) // 2 .. lengths + K // 2, held within MIN_LENGTH..max_length."""
    offsets_K = torch.arange(num_candidates, device=lengths_B.device) - (num_candidates - 1) // 2
    return (lengths_B[:, None] + offsets_K).clamp(MIN_LENGTH, max_length)


def _decode(
    model: Student,
    memory: Any,
    *,
    iterations: int,
    lengths_BK: Tensor,
    force_end: bool,
    observe: Observe | None = None,
) -> Candidates:
    require(
        iterations == 1 or model.refines,
        "iterations", iterations, f"1 for a {model.kind}",
        "Its slots do not read each other's words, so that a further pass would change nothing.",
    )  # fmt: skip
    num_sentences, num_candidates = lengths_BK.shape
    lengths_N = lengths_BK.flatten()
    device = lengths_N.device
    if iterations > 1:
        memory = model.prepare(memory)
    slots_T = torch.arange(int(lengths_N.max()), device=device)
    num_predicted_N = lengths_N - 1 if force_end else lengths_N
    open_NT = slots_T < num_predicted_N[:, None]
    tokens_NT = torch.where(slots_T < lengths_N[:, None], MASK, PAD)
    asked_NT = tokens_NT.clone()
    forbidden = [BOS, PAD, MASK, EOS] if force_end else []
    values_NT = torch.zeros(tokens_NT.shape, dtype=score_dtype(memory.states.dtype), device=device)
    _predict(model, model.share(memory, num_candidates), tokens_NT, values_NT, open_NT, forbidden)
    if force_end:  # only now: in training every slot of the first pass reads MASK, the last one too
        tokens_NT.scatter_(1, lengths_N[:, None] - 1, EOS)
    if observe is not None:
        observe(0, tokens_NT, values_NT, open_NT)
    for t in range(1, iterations):
        num_masked_N = (num_predicted_N * (iterations - t) // iterations).clamp_min(1)
        doubt_NT = values_NT.masked_fill(~open_NT, float("inf"))
        rank_NT = doubt_NT.argsort(dim=1, stable=True).argsort(dim=1)
        masked_NT = (rank_NT < num_masked_N[:, None]) & open_NT
        given_NT = tokens_NT.masked_fill(masked_NT, MASK)
        # A row that reads what it read in the pass before would answer the same.
        new_B = (given_NT != asked_NT).any(1).view(num_sentences, num_candidates).any(1)
        asked_NT = given_NT
        if new_B.all():
            tokens_NT.copy_(given_NT)
            _predict(model, model.share(memory, num_candidates), tokens_NT, values_NT, masked_NT, forbidden)
        elif new_B.any():
            live_B = new_B.nonzero().flatten()
            live_N = new_B.repeat_interleave(num_candidates)
            tokens_LT, values_LT = given_NT[live_N], values_NT[live_N]
            shared = model.share(memory.select(live_B), num_candidates)
            _predict(model, shared, tokens_LT, values_LT, masked_NT[live_N], forbidden)
            tokens_NT[live_N], values_NT[live_N] = tokens_LT, values_LT
        if observe is not None:
            observe(t, tokens_NT, values_NT, masked_NT)
    shape = (num_sentences, num_candidates)
    return Candidates(tokens_NT.view(*shape, -1), values_NT.sum(1).view(shape), lengths_BK, num_predicted_N.view(shape))


def _predict(
    model: Student, memory: Any, tokens_NT: Tensor, values_NT: Tensor, masked_NT: Tensor, forbidden: list[int]
) -> None:
    """Give the masked slots their most probable token and its log-probability. Only they meet the vocabulary."""
    hidden_RD = model.decode(memory, tokens_NT)[masked_NT]
    best_R, word_R = model.project_through(
        hidden_RD, lambda hidden, weight, bias: ops.linear_argmax(hidden, weight, bias, forbidden=forbidden)
    )
    tokens_NT[masked_NT], values_NT[masked_NT] = word_R, best_R
