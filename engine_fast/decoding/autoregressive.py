"""Greedy and beam search for the teacher, one cached decoder step per target position.

B sentences still searched, W hypotheses per sentence, C candidates, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.decoding.hypothesis import Hypothesis, score_dtype, top
from engine_fast.errors import require
from engine_fast.models import Teacher

MaxLength = tuple[float, float]
NEVER_EMITTED = (BOS, PAD, MASK)
_DEAD = float("-inf")


@torch.no_grad()
def beam_search(
    model: Teacher,
    source_BS: Tensor,
    *,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_length: MaxLength = (1.2, 10.0),
    min_length: int = 1,
    n_best: int = 1,
    stop_early: bool = True,
    forbidden: tuple[int, ...] = NEVER_EMITTED,
) -> list[list[Hypothesis]]:
    """Best hypotheses by score = log p(y | x) / length**length_penalty, length counting EOS.

    Each step takes the best 2 * beam continuations of a sentence. Those among the first `beam` that end in EOS are
    finished; the best `beam` others live on. A sentence leaves the batch once `beam` hypotheses are finished
    (stop_early), or else once no live one can still beat the worst of them. Its limit is a * S + b words before EOS,
    S counting the source's EOS, and never more than the model has positions; there EOS is forced. Equal scores:
    lowest index first, so the result does not depend on the order in which torch finds them.

    Args: source_BS: ids ending in EOS, right padded, on the model's device. The model is in eval mode.
        max_length: (a, b). min_length: words before EOS at least. forbidden: ids never emitted.
    Returns: per sentence, up to n_best hypotheses, best first. Scores are sums in float32 (float64 for a float64
        model), whatever the model's dtype. No gradients.
    Raises: ConfigError for beam < 1, n_best outside 1..beam or a negative penalty.
    """
    require(beam >= 1, "beam", beam, "at least 1")
    require(1 <= n_best <= beam, "n_best", n_best, f"1 to beam = {beam}", "Widen the beam for more hypotheses.")
    require(length_penalty >= 0, "length_penalty", length_penalty, "0 or more")
    finished: list[list[Hypothesis]] = [[] for _ in range(source_BS.shape[0])]
    if not finished:
        return finished
    live_B = torch.arange(len(finished), device=source_BS.device)
    limit_B = _limits(model, source_BS, max_length)
    cache = model.start_cache(model.encode(source_BS))
    # One hypothesis per sentence at first: the beams differ from the second word on.
    tokens_BWT = source_BS.new_full((len(finished), 1, 1), model.start)
    scores_BW: Tensor | None = None
    step = 0
    while True:
        width = tokens_BWT.shape[1]
        logits_NV = model.step(tokens_BWT[:, :, -1].flatten(), cache)
        at_limit_N = (limit_B <= step).repeat_interleave(width)
        values_NC, words_NC = _continuations(logits_NV, 2 * beam, forbidden, at_limit_N, step < min_length)
        if scores_BW is not None:
            values_NC = values_NC + scores_BW.view(-1, 1)
        num_words = values_NC.shape[1]
        best_BC, slot_BC = top(values_NC.view(len(live_B), -1), min(2 * beam, width * num_words))
        word_BC = words_NC.view(len(live_B), -1).gather(1, slot_BC)
        parent_BC = slot_BC // num_words

        ends_BC = (word_BC == EOS) & best_BC.isfinite()
        _finish(finished, live_B, tokens_BWT, best_BC, parent_BC, ends_BC[:, :beam], beam, length_penalty, stop_early)

        # The best `beam` that go on, in order; a dead one fills up where the vocabulary is too small.
        goes_on_BC = (word_BC != EOS) & best_BC.isfinite()
        kept_BW = (~goes_on_BC).to(torch.int8).argsort(dim=1, stable=True)[:, :beam]
        if kept_BW.shape[1] < beam:
            kept_BW = torch.cat([kept_BW, kept_BW[:, -1:].expand(-1, beam - kept_BW.shape[1])], dim=1)
        repeated_W = torch.arange(beam, device=live_B.device) >= goes_on_BC.shape[1]
        scores_BW = best_BC.masked_fill(~goes_on_BC, _DEAD).gather(1, kept_BW).masked_fill(repeated_W, _DEAD)

        # The most that the best live hypothesis can reach: no further loss, divided by the longest length.
        hope_B = scores_BW[:, 0] / (limit_B + 1).to(scores_BW.dtype) ** length_penalty
        going = [
            row
            for row, (sentence, hope) in enumerate(zip(live_B.tolist(), hope_B.tolist(), strict=True))
            if hope != _DEAD and not _settled(finished[sentence], beam, stop_early, hope)
        ]
        if not going:
            break
        going_B = torch.tensor(going, device=live_B.device)
        parent_BW = parent_BC.gather(1, kept_BW)[going_B]
        word_BW = word_BC.gather(1, kept_BW)[going_B]
        rows_N = (going_B[:, None] * width + parent_BW).flatten()
        cache.reorder(rows_N, same_sentences=width == beam and len(going) == len(live_B))
        history_BWT = tokens_BWT.flatten(0, 1)[rows_N].view(len(going), beam, -1)
        tokens_BWT = torch.cat([history_BWT, word_BW[:, :, None]], dim=2)
        live_B, limit_B, scores_BW = live_B[going_B], limit_B[going_B], scores_BW[going_B]
        step += 1
    return [sorted(hypotheses, key=lambda h: -h.score)[:n_best] for hypotheses in finished]


@torch.no_grad()
def greedy(
    model: Teacher,
    source_BS: Tensor,
    *,
    length_penalty: float = 1.0,
    max_length: MaxLength = (1.2, 10.0),
    min_length: int = 1,
    forbidden: tuple[int, ...] = NEVER_EMITTED,
) -> list[Hypothesis]:
    """The most probable next word at each step: beam_search with a beam of one, without its bookkeeping."""
    num_sentences = source_BS.shape[0]
    if not num_sentences:
        return []
    live_B = torch.arange(num_sentences, device=source_BS.device)
    limit_B = _limits(model, source_BS, max_length)
    cache = model.start_cache(model.encode(source_BS))
    last_B = source_BS.new_full((num_sentences,), model.start)
    tokens = source_BS.new_full((num_sentences, int(limit_B.max()) + 1), PAD)
    totals: Tensor | None = None
    step = 0
    while True:
        logits_BV = model.step(last_B, cache)
        values_B1, words_B1 = _continuations(logits_BV, 1, forbidden, limit_B <= step, step < min_length)
        if totals is None:
            totals = values_B1.new_zeros(num_sentences)
        last_B = words_B1[:, 0]
        totals[live_B] += values_B1[:, 0]
        tokens[live_B, step] = last_B
        going = last_B != EOS
        if not going.all():
            keep_B = going.nonzero().flatten()
            if not len(keep_B):
                break
            cache.reorder(keep_B)
            live_B, limit_B, last_B = live_B[keep_B], limit_B[keep_B], last_B[keep_B]
        step += 1
    rows = [[token for token in row if token != PAD] for row in tokens.tolist()]
    return [
        Hypothesis(row, value / len(row) ** length_penalty, value)
        for row, value in zip(rows, totals.tolist(), strict=True)
    ]


def _limits(model: Teacher, source_BS: Tensor, max_length: MaxLength) -> Tensor:
    """(B,) words before EOS at most."""
    lengths_B = (source_BS != PAD).sum(1)
    limit_B = (lengths_B * max_length[0] + max_length[1]).long()
    return limit_B.clamp(0, model.max_positions - 1)


def _continuations(
    logits_NV: Tensor, k: int, forbidden: tuple[int, ...], at_limit_N: Tensor, too_short: bool
) -> tuple[Tensor, Tensor]:
    """The k best next words of each row: (N, C) log-probabilities and ids. What is not allowed gets -inf.

    The probabilities are the model's own: forbidding a word does not raise the others. The logits are overwritten.
    """
    logits_NV = logits_NV.to(score_dtype(logits_NV.dtype))
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    ending_N = logits_NV[:, EOS].clone()
    logits_NV[:, list(forbidden)] = _DEAD
    if too_short:
        logits_NV[:, EOS] = _DEAD
    if at_limit_N.any():
        logits_NV[at_limit_N] = _DEAD
        logits_NV[:, EOS] = torch.where(at_limit_N, ending_N, logits_NV[:, EOS])
    values_NC, words_NC = top(logits_NV, min(k, logits_NV.shape[1]))
    return values_NC - total_N1, words_NC


def _finish(
    finished: list[list[Hypothesis]],
    live_B: Tensor,
    tokens_BWT: Tensor,
    best_BC: Tensor,
    parent_BC: Tensor,
    ends_BW: Tensor,
    beam: int,
    length_penalty: float,
    stop_early: bool,
) -> None:
    """File the hypotheses that have just ended: the first `beam` of a sentence, or (not stop_early) its best."""
    row_E, candidate_E = ends_BW.nonzero(as_tuple=True)
    if not len(row_E):
        return
    histories = tokens_BWT[row_E, parent_BC[row_E, candidate_E], 1:].tolist()
    values = best_BC[row_E, candidate_E].tolist()
    for sentence, history, value in zip(live_B[row_E].tolist(), histories, values, strict=True):
        hypothesis = Hypothesis([*history, EOS], value / (len(history) + 1) ** length_penalty, value)
        if len(finished[sentence]) < beam:
            finished[sentence].append(hypothesis)
        elif not stop_early:
            worst = min(range(beam), key=lambda i: finished[sentence][i].score)
            if hypothesis.score > finished[sentence][worst].score:
                finished[sentence][worst] = hypothesis


def _settled(hypotheses: list[Hypothesis], beam: int, stop_early: bool, hope: float) -> bool:
    return len(hypotheses) == beam and (stop_early or min(h.score for h in hypotheses) >= hope)
