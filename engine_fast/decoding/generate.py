"""A teacher's translations, whichever teacher it is.

B sentences, S source positions.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine_fast.decoding.autoregressive import NEVER_EMITTED, MaxLength, beam_search, greedy
from engine_fast.decoding.hypothesis import Hypothesis
from engine_fast.models import Teacher


@runtime_checkable
class OwnSearch(Protocol):
    """A network that comes with a search of its own."""

    def generate(
        self, source_BS: Tensor, *, beam: int, n_best: int, length_penalty: float, max_length: MaxLength
    ) -> list[list[tuple[list[int], float, float]]]:
        """Of each source up to n_best of (ids that end in EOS, score, log-probability in nats), best first."""
        ...


@torch.no_grad()
def generate(
    teacher: Teacher,
    source_BS: Tensor,
    *,
    beam: int = 1,
    n_best: int = 1,
    length_penalty: float = 1.0,
    max_length: MaxLength = (1.2, 10.0),
    forbidden: tuple[int, ...] = NEVER_EMITTED,
) -> list[list[Hypothesis]]:
    """Up to n_best translations of each source, best first, in reading order: see beam_search; beam = 1 is greedy.

    A network with a `generate` of its own searches by it; what it forbids stands in its own settings, then.
    """
    if isinstance(teacher, OwnSearch):
        found = teacher.generate(
            source_BS, beam=beam, n_best=n_best, length_penalty=length_penalty, max_length=max_length
        )
        return [[Hypothesis(*each) for each in hypotheses] for hypotheses in found]
    if beam == 1:
        best = greedy(teacher, source_BS, length_penalty=length_penalty, max_length=max_length, forbidden=forbidden)
        ranked = [[hypothesis] for hypothesis in best]
    else:
        ranked = beam_search(
            teacher, source_BS, beam=beam, n_best=n_best, length_penalty=length_penalty, max_length=max_length,
            forbidden=forbidden,
        )  # fmt: skip
    if not teacher.right_to_left:
        return ranked
    return [
        [Hypothesis([*h.tokens[-2::-1], h.tokens[-1]], h.score, h.log_probability) for h in hypotheses]
        for hypotheses in ranked
    ]
