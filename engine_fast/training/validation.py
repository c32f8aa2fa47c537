"""Dev figures: the loss over the whole dev set, BLEU of its first sentences, energies where there is a teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine_fast.data.batching import sorted_batches
from engine_fast.data.vocabulary import Vocabulary
from engine_fast.distributed import World
from engine_fast.distributed.presence import beat
from engine_fast.evaluation.metrics import corpus_bleu
from engine_fast.training.feeding import Corpus, clipped
from engine_fast.training.metrics import Sums
from engine_fast.training.seeding import seed_torch

HIGHER_IS_BETTER = {"loss": False, "bleu": True, "energy": False, "relaxed_energy": False}
Decode = Callable[[nn.Module, Tensor], list[list[int]]]


@dataclass(frozen=True, slots=True)
class BleuSet:
    """The dev sentences that are translated, and what they should be."""

    corpus: Corpus
    references: list[list[str]]
    """Streams, each as long as the set."""
    vocabulary: Vocabulary
    decode: Decode
    """(model, sources (B, S)) -> ids of each translation."""
    max_positions: int
    tokenize: str


class Validator:
    """Measures a model; the same weights give the same figures, whenever and on however many ranks."""

    def __init__(
        self,
        corpus: Corpus,
        objective_of: Callable[[nn.Module], nn.Module],
        *,
        max_tokens: int,
        bleu: BleuSet | None,
        seed: int,
        world: World,
        stopping: Callable[[], bool],
    ) -> None:
        self._corpus, self._objective_of, self._bleu, self._seed, self._world = corpus, objective_of, bleu, seed, world
        self._stopping = stopping
        self._batches = sorted_batches(corpus.target_lengths, max_tokens, source_lengths=corpus.source_lengths)
        self._bleu_batches = []
        if bleu is not None:
            sources = bleu.corpus.source_lengths
            self._bleu_batches = sorted_batches(sources, max(max_tokens, int(sources.max())))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float] | None:
        """Figures of a model in eval mode, equal on every rank; None if a signal came in the middle."""
        started = time.monotonic()
        figures = self._losses(model)
        if figures is not None and self._bleu is not None:
            bleu = self._score(model, self._bleu)
            figures = None if bleu is None else {**figures, "bleu": bleu}
        if figures is not None:
            figures["seconds"] = time.monotonic() - started
        return figures

    def _losses(self, model: nn.Module) -> dict[str, float] | None:
        objective = self._objective_of(model).eval()
        measure = getattr(objective, "evaluate", None) or (lambda batch: objective(batch).stats)
        teachers = getattr(objective, "teachers", ())
        sums, world = Sums(self._world.device), self._world
        were_training = [teacher.training for teacher in teachers]
        for teacher in teachers:
            teacher.eval()
        try:
            for number in range(0, len(self._batches), world.size):
                if world.any(self._stopping()):
                    return None
                mine = number + world.rank
                beat(f"validation: loss of batch {mine + 1}")
                seed_torch(self._seed, "valid", mine)
                # A rank without a batch of its own computes the first again: a sharded teacher needs all of them.
                batch = self._batches[mine if mine < len(self._batches) else 0]
                found = measure(self._corpus.collate(batch).to(world.device))
                if mine < len(self._batches):
                    sums.add(found)
        finally:
            for teacher, was_training in zip(teachers, were_training, strict=True):
                teacher.train(was_training)
        figures = sums.averages(world)
        if {"energy", "relaxed_energy"} <= figures.keys():
            figures["gap"] = figures["energy"] - figures["relaxed_energy"]
        return figures

    def _score(self, model: nn.Module, bleu: BleuSet) -> float | None:
        world, lines = self._world, {}
        for number in range(0, len(self._bleu_batches), world.size):
            if world.any(self._stopping()):
                return None
            if number + world.rank < len(self._bleu_batches):
                chosen = self._bleu_batches[number + world.rank]
                beat(f"validation: translating batch {number + world.rank + 1}")
                source = clipped(bleu.corpus.collate(chosen), bleu.max_positions).to(world.device)
                for index, ids in zip(chosen.tolist(), bleu.decode(model, source), strict=True):
                    lines[index] = bleu.vocabulary.decode(ids)
        everywhere = {index: line for part in world.gather(lines) for index, line in part.items()}
        hypotheses = [everywhere[index] for index in range(len(everywhere))]
        return world.broadcast(
            corpus_bleu(hypotheses, bleu.references, tokenize=bleu.tokenize) if world.is_main else 0.0
        )
