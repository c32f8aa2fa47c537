"""The three losses. Each module owns what is trained; a frozen teacher is borrowed, never a child.

B sentences, S source positions, T target positions, N real target positions, V vocabulary.
Every total is a sum over target tokens (nats); the loop divides by the global number of target tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_fast.config import CMLMConfig, EngineConfig, TeacherConfig, TemperatureSchedule
from engine_fast.data.batching import Batch
from engine_fast.data.symbols import EOS, MASK, PAD
from engine_fast.decoding.mask_predict import MIN_LENGTH, predict_lengths
from engine_fast.energies import (
    Energy,
    GivenLogits,
    GradientScale,
    KeptLogits,
    RecomputedLogits,
    Relaxation,
    ScaledHead,
    inner_positions,
)
from engine_fast.models import Student, Teacher, reverse_words, shift_right

T = TypeVar("T")
Within = Callable[[Callable[[Any], Any]], Any]


@dataclass(frozen=True, slots=True)
class Loss:
    """What one micro-batch costs."""

    total: Tensor
    """Scalar with a graph: the sum that is minimised."""
    stats: dict[str, Tensor]
    """Detached float32 sums over the micro-batch."""


class TeacherObjective(nn.Module):
    """Label-smoothed cross-entropy of the references: (1-eps) * nll + eps/V * sum_v nll_v."""

    def __init__(self, model: Teacher, config: TeacherConfig) -> None:
        super().__init__()
        self.trained = model
        self.label_smoothing = config.label_smoothing

    def forward(self, batch: Batch) -> Loss:
        memory = self.trained.encode(batch.source)
        real_BT = batch.target != PAD
        target_BT = reverse_words(batch.target, real_BT) if self.trained.right_to_left else batch.target
        hidden_BTD = self.trained.decode(memory, shift_right(target_BT, self.trained.start))
        logits_NV = self.trained.project(hidden_BTD[real_BT])
        total, nll = smoothed_cross_entropy(logits_NV, target_BT[real_BT], self.label_smoothing)
        return Loss(total, _stats(batch, loss=total, nll=nll))


class CMLMObjective(nn.Module):
    """Cross-entropy of uniformly many masked tokens given the rest, plus the length loss.

    Each sentence of n tokens (end symbol included) has 1..n of them masked, uniformly; only these are predicted.
    In eval mode everything is masked, as in one-pass decoding; and always for a student that does not refine, which
    reads no words.
    """

    def __init__(self, student: Student, config: CMLMConfig) -> None:
        super().__init__()
        self.trained = student
        self.label_smoothing, self.length_loss_weight = config.label_smoothing, config.length_loss_weight

    def forward(self, batch: Batch) -> Loss:
        real_BT = batch.target != PAD
        masked_BT = draw_masks(real_BT) if self.training and self.trained.refines else real_BT
        return self.loss_of(batch, masked_BT)

    def loss_of(self, batch: Batch, masked_BT: Tensor) -> Loss:
        """The loss for a given (B, T) choice of masked positions."""
        memory, length_logits_BL = self.trained.encode(batch.source)
        tokens_BT = batch.target.masked_fill(masked_BT, MASK)
        hidden_BTD = self.trained.decode(memory, tokens_BT)
        logits_NV = self.trained.project(hidden_BTD[masked_BT])
        total, nll = smoothed_cross_entropy(logits_NV, batch.target[masked_BT], self.label_smoothing)
        length_loss, length_correct = length_cross_entropy(length_logits_BL, batch.target)
        total = total + self.length_loss_weight * length_loss
        stats = _stats(batch, loss=total, nll=nll, length_loss=length_loss, length_correct=length_correct)
        stats["masked_tokens"] = masked_BT.sum().float()
        return Loss(total, stats)


class EngineObjective(nn.Module):
    """ENGINE (paper, eq. 1): relaxed energy + length_loss_weight * length loss + alpha * cross-entropy
    + repetition_weight * expected repetitions.

    The student sees masks at every real position, of the data's lengths or of its own. The teachers behind `energy` are
    frozen: their encoders run once without a graph, their decoders pass gradients to the student's logits only; float16
    ones beside a float32 student at a scale that float16 can hold. `within(use)` calls use(_) where the weights of a
    sharded teacher are whole.
    """

    def __init__(
        self,
        student: Student,
        energy: Energy,
        config: EngineConfig,
        *,
        within: Within | None = None,
        encode: Callable[[Tensor], Any] | None = None,
    ) -> None:
        """encode: what to call for energy.encode, if something stands between: see Reuse."""
        super().__init__()
        self.trained = student
        # Energies are no modules: a teacher is never sharded with the student, saved or trained.
        self.energy, self._within = energy, (within,)
        self._encode = energy.encode if encode is None else encode
        self._memories: dict[int, Any] = {}
        self.config = config
        self.relaxation = Relaxation(config.o1, config.o2, config.temperature, stl_logits=config.stl_logits)
        self._now = self._relaxation_at(0.0)
        self._whole_log_probabilities = "STL" in (config.o1, config.o2) and config.stl_logits == "log_probabilities"
        self._warn_of_settings_without_effect()

    def _warn_of_settings_without_effect(self) -> None:
        config = self.config
        if config.o1_temperature is not None and config.o1 == "STL":
            warnings.warn(
                "engine.o1_temperature has no effect: engine.o1 = 'STL' reads no temperature, neither in its words nor "
                "in its Jacobian.",
                stacklevel=3,
            )
        reasons = [name for name in ("cross_entropy_weight", "repetition_weight") if getattr(config, name)]
        reason = (reasons or ["stl_logits"])[0]
        if config.head_memory == "recompute" and (reasons or self._whole_log_probabilities):
            warnings.warn(
                f"engine.head_memory = 'recompute' has no effect: engine.{reason} = {getattr(config, reason)!r} needs "
                "the student's logits whole.",
                stacklevel=3,
            )

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return self.energy.teachers

    def prepare(self, batches: Sequence[Batch], *, done: float) -> None:
        """The teacher's encoder states of an update's micro-batches, made now, for the forward() of each; and O1's
        temperature after `done`, 0 to 1, of the stage.

        A sharded teacher encodes in forward(): its layers are then gathered in one order, which can be foreseen. One
        with dropout does too: each micro-batch has a seed of its own, whoever computes it.
        """
        self._now = self._relaxation_at(done)
        if self._within[0] is None and not any(teacher.training for teacher in self.teachers):
            with torch.no_grad():
                self._memories = {id(batch): self._encode(batch.source) for batch in batches}

    def forward(self, batch: Batch, *, noise: tuple[Tensor | None, Tensor | None] = (None, None)) -> Loss:
        memory, length_logits_BL = self.trained.encode(batch.source)
        target_BT = batch.target
        if self.config.predicted_lengths:
            target_BT = slots_of(length_logits_BL, longest=self._longest(len(batch.source)))
        hidden_BTD = self.trained.decode(memory, torch.where(target_BT != PAD, MASK, PAD))
        real_BT, inner_BT = target_BT != PAD, inner_positions(target_BT)
        scale = self._scale(hidden_BTD)
        logits = self._logits(hidden_BTD[inner_BT], self.trained if scale is None else ScaledHead(self.trained, scale))

        def score() -> Tensor:
            of_teachers = self._memories.pop(id(batch), None)
            if of_teachers is None:
                with torch.no_grad():
                    of_teachers = self._encode(batch.source)
            return self.energy.score_relaxed(of_teachers, logits, target_BT, self._now, noise=noise, reduction="sum")

        energy = self._with_teachers(score)
        energy = energy if scale is None else scale.enter(energy)
        length_loss, length_correct = length_cross_entropy(length_logits_BL, batch.target)
        total = energy + self.config.length_loss_weight * length_loss
        stats = {"energy": energy, "length_loss": length_loss, "length_correct": length_correct}
        if self.config.repetition_weight:
            assert not isinstance(logits, RecomputedLogits)
            z_MV = logits.z_MV if scale is None else scale.enter(logits.z_MV)
            stats["repetition"] = expected_repetitions(z_MV, inner_BT)
            total = total + self.config.repetition_weight * stats["repetition"]
        if self.config.cross_entropy_weight:
            assert not isinstance(logits, RecomputedLogits)
            z_MV, end_BV = logits.z_MV, self.trained.project(hidden_BTD[real_BT & ~inner_BT])
            z_MV = z_MV if scale is None else scale.enter(z_MV)
            gold = torch.cat([batch.target[inner_BT], batch.target.new_full((len(end_BV),), EOS)])
            cross_entropy, stats["nll"] = smoothed_cross_entropy(
                torch.cat([z_MV, end_BV]), gold, self.config.label_smoothing
            )
            total = total + self.config.cross_entropy_weight * cross_entropy
        return Loss(total if scale is None else scale.watch(total), _stats(batch, loss=total, **stats))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch: relaxed_energy (this objective's operators) and energy of the arg-max words, in nats.

        Both use the lengths of batch.target and put the end symbol in the last slot (paper, section 4.4); the relaxed
        one has config.temperature under both operators, so that figures of different updates and runs compare.
        """
        memory, length_logits_BL = self.trained.encode(batch.source)
        hidden_BTD = self.trained.decode(memory, torch.where(batch.target != PAD, MASK, PAD))
        z_MV = self.trained.project(hidden_BTD[inner_positions(batch.target)])
        words_BT = batch.target.masked_scatter(inner_positions(batch.target), z_MV.argmax(-1))

        def score() -> tuple[Tensor, Tensor]:
            of_teachers = self._encode(batch.source)
            relaxed = self.energy.score_relaxed(of_teachers, z_MV, batch.target, self.relaxation, reduction="sum")
            return relaxed, self.energy.score(of_teachers, words_BT, real_BT=batch.target != PAD).sum()

        relaxed, energy = self._with_teachers(score)
        length_loss, length_correct = length_cross_entropy(length_logits_BL, batch.target)
        stats = {"energy": energy, "relaxed_energy": relaxed, "length_loss": length_loss}
        return _stats(batch, loss=relaxed, length_correct=length_correct, **stats)

    def _relaxation_at(self, done: float) -> Relaxation:
        schedule = self.config.o1_temperature
        if schedule is None:
            return self.relaxation
        return replace(self.relaxation, o1_temperature=temperature_at(schedule, done))

    def _longest(self, num_sentences: int) -> int:
        """Slots that a predicted length may ask for: what the batch's budget allows, as it does for the data's own
        lengths, and what every network has positions for."""
        positions = min(network.max_positions for network in (self.trained, *self.teachers))
        return max(MIN_LENGTH, min(self.config.batch.max_tokens // num_sentences, positions))

    def _with_teachers(self, use: Callable[[], T]) -> T:
        within = self._within[0]
        return use() if within is None else within(lambda _: use())

    def _scale(self, hidden: Tensor) -> GradientScale | None:
        """DeepSpeed scales an fp16 student's loss; nobody scales an fp32 one's."""
        halved = any(next(teacher.parameters()).dtype == torch.float16 for teacher in self.teachers)
        halved = halved and hidden.dtype == torch.float32
        return GradientScale() if halved and torch.is_grad_enabled() else None

    def _logits(self, hidden_MD: Tensor, head: Student | ScaledHead) -> GivenLogits | KeptLogits | RecomputedLogits:
        """In the form that the configuration asks for; log-probabilities and the alpha term need them whole."""
        if self._whole_log_probabilities:
            return GivenLogits(head.project(hidden_MD))
        if self.config.head_memory == "keep" or self.config.cross_entropy_weight or self.config.repetition_weight:
            return KeptLogits(head, hidden_MD)
        return RecomputedLogits(head, hidden_MD)


def smoothed_cross_entropy(logits_NV: Tensor, target_N: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(sum of (1-eps) * nll + eps/V * sum_v -log p_v, sum of nll), float32 accumulation; nll carries no graph."""
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    log_p_NV = logits_NV.log_softmax(-1)
    nll = F.nll_loss(log_p_NV, target_N, reduction="sum")
    smooth = -log_p_NV.sum() / log_p_NV.shape[1] if label_smoothing else 0.0
    return (1 - label_smoothing) * nll + label_smoothing * smooth, nll.detach()


def length_cross_entropy(length_logits_BL: Tensor, target_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over sentences of -log p(length), number of right guesses); lengths count the end symbol."""
    logits_BL = length_logits_BL if length_logits_BL.dtype == torch.float64 else length_logits_BL.float()
    length_B = (target_BT != PAD).sum(-1)
    correct = (logits_BL.argmax(-1) == length_B).sum()
    return F.cross_entropy(logits_BL, length_B, reduction="sum"), correct


def temperature_at(schedule: TemperatureSchedule, done: float) -> float:
    """The temperature after `done` of the stage, 0 at its first update and 1 at its last."""
    if schedule.shape == "linear":
        return schedule.start + (schedule.end - schedule.start) * done
    return float(schedule.start * (schedule.end / schedule.start) ** done)


def slots_of(length_logits_BL: Tensor, *, longest: int) -> Tensor:
    """(B, T) ids without meaning but for their padding: as many slots as each sentence's most probable length has.

    As in decoding, a sentence has a word and the end symbol at least; T <= longest. No gradient.
    """
    length_B = predict_lengths(length_logits_BL.detach()[:, : longest + 1], 1)[:, 0]
    slots_T = torch.arange(int(length_B.max()), device=length_B.device)
    return torch.where(slots_T < length_B[:, None], MASK, PAD)


def expected_repetitions(z_MV: Tensor, inner_BT: Tensor) -> Tensor:
    """sum over neighbours t, t+1 of a sentence of <softmax(z_t), softmax(z_{t+1})>: how many words would equal the one
    before them if each were drawn from its row. z_MV: rows of the True entries of inner_BT in row-major order."""
    p_MV = (z_MV if z_MV.dtype == torch.float64 else z_MV.float()).softmax(-1)
    sentence_M = inner_BT.nonzero()[:, 0]
    same_M = sentence_M[1:] == sentence_M[:-1]
    return ((p_MV[1:] * p_MV[:-1]).sum(-1) * same_M).sum()


def draw_masks(real_BT: Tensor) -> Tensor:
    """(B, T) bool: in each sentence of n real positions, k of them at random, k uniform on 1..n."""
    length_B = real_BT.sum(-1)
    k_B = (torch.rand(length_B.shape, device=real_BT.device) * length_B).long() + 1
    order_BT = torch.rand(real_BT.shape, device=real_BT.device).masked_fill(~real_BT, 2.0).argsort(-1).argsort(-1)
    return (order_BT < k_B[:, None]) & real_BT


def _stats(batch: Batch, **sums: Tensor) -> dict[str, Tensor]:
    stats = {name: value.detach().float() for name, value in sums.items()}
    stats["tokens"] = (batch.target != PAD).sum().float()
    stats["sentences"] = batch.target.new_full((), batch.target.shape[0], dtype=torch.float32)
    return stats
