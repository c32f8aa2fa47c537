"""The models that one service offers, by name: what its threads run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from engine_fast.data.symbols import EOS, UNK
from engine_fast.decoding import Hypothesis, Rescore, TranslateReport, Translator
from engine_fast.decoding.sources import encode_lines, one_line
from engine_fast.energies import discrete_energy
from engine_fast.errors import CheckpointError, VocabularyError
from engine_fast.inference.load import load
from engine_fast.models import LoadedModel, Precision, Student, Teacher

_PLANNED = 1 << 40
"""More tokens than any batch has: what reaches a translator here is one batch already."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How a sentence is to be decoded. Sentences of equal wishes can share a batch."""

    iterations: int | None = None
    length_beam: int | None = None
    beam: int | None = None
    rerank: bool = False
    explain: bool = False
    """For /explain: answered by an Explanation, one sentence at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """A sentence as the model reads it."""

    row: list[int]
    """Ids, the end symbol included, cut to the model's positions."""
    num_unknown: int
    truncated: bool

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Translation:
    """What became of one sentence."""

    text: str
    source: Source
    hypothesis: Hypothesis


@dataclass(slots=True)
class System:
    """A model under its name, with the teacher that judges (None: nobody does). One thread uses it: see Worker."""

    name: str
    translator: Translator
    teacher: Teacher | None

    @property
    def loaded(self) -> LoadedModel:
        return self.translator.loaded

    @property
    def is_student(self) -> bool:
        return isinstance(self.loaded.model, Student)

    @property
    def on_gpu(self) -> bool:
        return next(self.loaded.model.parameters()).is_cuda

    @property
    def refines(self) -> bool:
        """Whether further passes change anything."""
        return isinstance(self.loaded.model, Student) and self.loaded.model.refines

    @property
    def rescore(self) -> Rescore | None:
        """The teacher's energy, where there are length candidates to choose from."""
        return partial(discrete_energy, self.teacher) if self.teacher is not None and self.is_student else None

    @property
    def max_positions(self) -> int:
        positions = [self.translator.max_positions]
        return min([*positions, self.teacher.max_positions] if self.teacher is not None else positions)

    def without_effect(self, wish: Wish) -> list[str]:
        """Names of what was asked for and changes nothing here."""
        if not self.is_student:
            asked = {"iterations": wish.iterations, "length_beam": wish.length_beam, "rerank": wish.rerank or None}
        else:
            asked = {"beam": wish.beam, "iterations": wish.iterations if not self.refines else None}
            asked |= {"rerank": wish.rerank if self.teacher is None and wish.rerank else None}
        return [name for name, value in asked.items() if value is not None]

    def settled(self, wish: Wish) -> Wish:
        """The wish with this model's own settings where none were asked for, or where asking changes nothing."""
        own, ignored = self.translator.settings, set(self.without_effect(wish))
        chosen = {
            name: value
            for name in ("iterations", "length_beam", "beam")
            if name not in ignored and (value := getattr(wish, name)) is not None
        }
        defaults = {"iterations": own.iterations, "length_beam": own.length_beam, "beam": own.beam}
        return Wish(**(defaults | chosen), rerank=wish.rerank and "rerank" not in ignored, explain=wish.explain)

    def prepare(self, texts: Sequence[str]) -> list[Source]:
        limit = self.max_positions
        rows = encode_lines(texts, self.loaded.source_vocabulary, limit, TranslateReport())
        return [Source([*row[:-1][: limit - 1], EOS], row.count(UNK), len(row) > limit) for row in rows]

    def width(self, settings: Wish) -> int:
        return self.translator_for(settings).width

    def run(self, settings: Wish, prepared: Sequence[Source]) -> list[Any]:
        """Translations, or Explanations of a wish for them."""
        from engine_fast.inference.serving.explain import explain

        if settings.explain:
            return [explain(self, settings, source) for source in prepared]
        return self.translate(settings, prepared)

    def translate(self, settings: Wish, prepared: Sequence[Source]) -> list[Translation]:
        translator = self.translator_for(settings)
        decode = self.loaded.target_vocabulary.decode
        return [
            Translation(one_line(decode(h.tokens)).strip(), source, h)
            for source, h in zip(prepared, translator.translate_ids([s.row for s in prepared]), strict=True)
        ]

    def translator_for(self, settings: Wish) -> Translator:
        """A translator of its own for each batch: its report is not shared."""
        own = replace(
            self.translator.settings,
            **{name: getattr(settings, name) for name in ("iterations", "length_beam", "beam")},
            max_positions=self.max_positions,
            max_tokens=_PLANNED,
        )
        return Translator(self.loaded, own, self.rescore if settings.rerank else None)


def load_systems(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    cmlm: str | Path | None = None,
    device: torch.device | str = "auto",
    precision: Precision = "fp32",
    cuda_graphs: bool = False,
) -> dict[str, System]:
    """The systems of a service by name, the one that answers by default first.

    Args: model: a student, which is then called engine, or a teacher. teacher: judges, and is offered too. cmlm: a
        second student to compare with. device, precision, cuda_graphs: as load() takes them.
    Raises what load() raises; CheckpointError for a student where a teacher is expected and the reverse;
    VocabularyError for models that do not share their vocabularies.
    """
    opened = partial(load, device=device, precision=precision, cuda_graphs=cuda_graphs)
    main = opened(model)
    found = {"engine" if isinstance(main.loaded.model, Student) else "teacher": main}
    if teacher is not None:
        if "teacher" in found:
            raise CheckpointError(f"{model}: is a teacher already. Give a student as --model, or leave --teacher out.")
        found["teacher"] = _of_kind("teacher", opened(teacher), teacher)
    if cmlm is not None:
        found["cmlm"] = _of_kind("student", opened(cmlm), cmlm)
    for name, other in found.items():
        _require_same_vocabularies(main.loaded, other.loaded, name)
    judge = found["teacher"].loaded.model if "teacher" in found else None
    assert judge is None or isinstance(judge, Teacher)
    return {name: System(name, translator, judge) for name, translator in found.items()}


def _of_kind(wanted: Literal["teacher", "student"], translator: Translator, path: str | Path) -> Translator:
    model = translator.loaded.model
    if isinstance(model, Teacher) != (wanted == "teacher"):
        raise CheckpointError(f"{path}: holds a {model.kind} model, expected a {wanted}. Give the other directory.")
    return translator


def _require_same_vocabularies(one: LoadedModel, other: LoadedModel, name: str) -> None:
    for side in ("source", "target"):
        hashes = [getattr(loaded, f"{side}_vocabulary").fingerprint[:12] for loaded in (one, other)]
        if hashes[0] != hashes[1]:
            raise VocabularyError(
                f"the {name}'s {side} vocabulary is {hashes[1]}, the model's {hashes[0]}. "
                "Serve models that were trained together."
            )
