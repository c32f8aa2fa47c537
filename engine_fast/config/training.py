"""How a model is trained: batches, optimiser, schedule, validation, and the three objectives' own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from engine_fast.config.base import Section
from engine_fast.config.model import AnyArchitecture, Architecture, StudentArchitecture, TeacherArchitecture

ROUNDING_ONLY = frozenset(
    {
        "zero_stage", "offload", "overlap_communication", "compile", "activation_checkpointing", "head_memory",
        "teacher_placement", "teacher_compile", "teacher_checkpointing",
    }
)  # fmt: skip
"""Settings of a trained stage that say where things are kept and computed: they change results by rounding at most."""

OperatorName = Literal["SX", "STL", "SG", "ST", "GX"]


class BatchConfig(Section):
    """One update = `accumulate` micro-batches on each rank, or `micro_batches` over all of them."""

    max_tokens: PositiveInt = 4096
    """Target tokens per rank and micro-step, padding included."""
    max_sentences: PositiveInt | None = None
    """Cap on sentences per micro-step."""
    length_buckets: PositiveInt = 16
    """Sorted pools per epoch at most, each of 256 micro-batches or more; 1 sorts the whole epoch."""
    accumulate: PositiveInt = 1
    """Micro-batches per update and rank: twice the ranks, twice the batch."""
    micro_batches: PositiveInt | None = None
    """Micro-batches per update over all ranks together: the same updates at any number of ranks. Without accumulate."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> BatchConfig:
        if self.micro_batches is not None and self.accumulate != 1:
            raise ValueError(
                f"micro_batches = {self.micro_batches} already says how many micro-batches an update has: "
                f"leave accumulate at 1, got {self.accumulate}"
            )
        return self

    def per_update(self, ranks: int) -> int:
        """Micro-batches of an update, over all ranks."""
        return self.micro_batches or self.accumulate * ranks

    def per_rank(self, ranks: int) -> int:
        """Micro-batches of an update on each rank, stand-ins counted."""
        return -(-self.per_update(ranks) // ranks)


class OptimConfig(Section):
    """Adam with or without decoupled weight decay, and the learning-rate schedule."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """adamw decouples the weight decay from the gradient."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Applied to every parameter."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 = no clipping."""
    schedule: Literal["inverse_sqrt", "constant", "cosine", "linear"] = "inverse_sqrt"
    """Shape after warm-up; cosine and linear end at min_lr at max_updates."""
    warmup_updates: NonNegativeInt = 4000
    """Updates from warmup_lr to lr, linear."""
    warmup_lr: NonNegativeFloat = 1e-7
    """Learning rate of the first update."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of every schedule."""

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each of betas must lie in [0, 1), got {betas}")
        return betas


class OffloadConfig(Section):
    """What is kept in the host's memory instead of the device's."""

    optimizer: bool = False
    """Master weights and Adam's moments, and Adam itself; needs zero_stage >= 1."""
    parameters: bool = False
    """The weights' shards between their uses; needs zero_stage 3."""


class EarlyStopConfig(Section):
    """Which dev figure chooses the best checkpoint, and when to give up."""

    metric: Literal["loss", "bleu", "energy", "relaxed_energy"] = "loss"
    """loss: the stage's own; bleu: of the dev translations; energy: discrete; relaxed_energy: the trained one."""
    patience: NonNegativeInt = 0
    """Validations without improvement before stopping; 0 = never stop early."""


class TrainConfig(Section):
    """Shared by the three trained stages."""

    architecture: AnyArchitecture = Architecture()
    """The model."""
    seed: NonNegativeInt | None = None
    """Of this stage alone; default: the run's."""
    max_updates: PositiveInt = 100_000
    """Optimiser steps at most."""
    max_epochs: PositiveInt | None = None
    """Passes over the training data at most."""
    batch: BatchConfig = BatchConfig()
    """Batches."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the trained model; bf16 and fp16 keep fp32 master weights (fp16: GPU only)."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; default 0 for fp32 and 1 for bf16/fp16 (stage 0 is wrong there)."""
    offload: OffloadConfig = OffloadConfig()
    """What leaves the device."""
    overlap_communication: bool | None = None
    """Reduce gradients (stage 3: also gather weights) while the backward pass goes on; default: on GPUs."""
    compile: bool = False
    """torch.compile the trained model's stacks; needs zero_stage < 3."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Moving average of the fp32 weights, once an update, validated and exported in their place; 0 = off."""
    average_last: NonNegativeInt = 0
    """Average the weights of the last k kept checkpoints for the exported model; 0 = export the best."""
    validate_every: PositiveInt = 500
    """Updates between validations."""
    checkpoint_every: PositiveInt = 500
    """Updates between checkpoints."""
    keep_last: PositiveInt = 2
    """Checkpoints kept besides the best; at least average_last."""
    log_every: PositiveInt = 10
    """Updates between lines of metrics.jsonl."""
    valid_bleu_sentences: NonNegativeInt = 500
    """Dev sentences translated at each validation; 0 = none."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    """Selection and stopping."""

    @model_validator(mode="after")
    def _stage_fits_precision(self) -> TrainConfig:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision = {self.precision} needs zero_stage >= 1 (DeepSpeed's stage 0 starts Adam a step late)"
            )
        stage = self.effective_zero_stage
        for setting, on, least in (
            ("offload.optimizer", self.offload.optimizer, 1),
            ("offload.parameters", self.offload.parameters, 3),
        ):
            if on and stage < least:
                raise ValueError(f"{setting} = true needs zero_stage >= {least}, got {stage}")
        if self.compile and stage == 3:
            raise ValueError("compile = true needs zero_stage < 3: there a layer's weights come and go around its call")
        if self.average_last > self.keep_last:
            raise ValueError(
                f"average_last = {self.average_last} needs keep_last >= {self.average_last}, got {self.keep_last}"
            )
        if self.average_last and self.ema_decay:
            raise ValueError("average_last and ema_decay are two averages of the same weights: set one of them")
        return self

    @property
    def effective_zero_stage(self) -> int:
        return (0 if self.precision == "fp32" else 1) if self.zero_stage is None else self.zero_stage


class PretrainedConfig(Section):
    """A teacher that exists already."""

    path: str
    """A model directory (ours, or one of Hugging Face), or a name on the Hugging Face hub."""
    revision: str | None = None
    """Of a model on the hub."""
    source_language: str | None = None
    """The tokenizer's own code, where one model knows many languages (mBART: de_DE, NLLB: deu_Latn)."""
    target_language: str | None = None
    """Likewise."""
    prompt: str = ""
    """Text in front of every source (T5: "translate English to German: ")."""


class TeacherConfig(TrainConfig):
    """The autoregressive teacher: label-smoothed cross-entropy on the references."""

    architecture: TeacherArchitecture = Architecture()
    """The model."""
    pretrained: PretrainedConfig | None = None
    """Take this one instead of training."""
    right_to_left: bool = False
    """Read and write targets from the last word to the first."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Weight of the uniform distribution in the target."""


class CMLMConfig(TrainConfig):
    """The conditional masked language model baseline (Ghazvininejad et al. 2019)."""

    architecture: StudentArchitecture = Architecture(
        norm_epsilon=1e-12, positions="learned", activation="gelu", scale_embedding=False, init="normal"
    )
    """The model; its defaults are the CMLM's."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Weight of the uniform distribution in the target."""
    length_loss_weight: NonNegativeFloat = 1.0
    """Factor of the length cross-entropy; both losses are sums (over tokens, over sentences)."""
    from_teacher: bool = False
    """Start from the teacher's weights wherever names and shapes agree."""
    data: Literal["distilled", "references"] = "distilled"
    """Targets: the teacher's beam output, or the corpus's own."""


class EnsembleMember(Section):
    """One more teacher beside the run's."""

    path: str
    """A model directory, or the stage directory around one; its vocabularies must be the run's."""
    weight: PositiveFloat = 1.0
    """Factor of its energy; the run's own teacher has 1."""


class TemperatureSchedule(Section):
    """O1's temperature over the max_updates of the stage, from soft to hard."""

    start: PositiveFloat = 1.0
    """At the first update."""
    end: PositiveFloat = 0.1
    """At the last one."""
    shape: Literal["linear", "exponential"] = "exponential"
    """exponential: by a constant factor from update to update."""


class EngineConfig(TrainConfig):
    """ENGINE: the student minimises the frozen teacher's energy (paper, eq. 1). The architecture is the CMLM's."""

    architecture: StudentArchitecture = Architecture()
    """The model: the CMLM's, but for its dropout."""
    o1: OperatorName = "SX"
    """Operator that feeds the teacher's decoder."""
    o2: OperatorName = "ST"
    """Operator that selects the scored words."""
    temperature: PositiveFloat = 1.0
    """Divides the logits (and noise) under each operator's softmax."""
    stl_logits: Literal["logits", "log_probabilities"] = "logits"
    """What STL's identity Jacobian is taken with respect to: logits (paper) or log-probabilities (authors' code)."""
    length_loss_weight: NonNegativeFloat = 1.0
    """Factor of the length cross-entropy."""
    cross_entropy_weight: NonNegativeFloat = 0.0
    """alpha: factor of the label-smoothed cross-entropy on the targets."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Smoothing of that cross-entropy."""
    ensemble: list[EnsembleMember] = []
    """Further teachers: the energy is the weighted sum of all of them."""
    o1_temperature: TemperatureSchedule | None = None
    """O1's temperature as a schedule; o2 keeps `temperature`."""
    predicted_lengths: bool = False
    """Train on the lengths that the student predicts, not on those of the data."""
    repetition_weight: NonNegativeFloat = 0.0
    """Factor of the expected number of tokens equal to the token before, summed over the batch."""
    data: Literal["distilled", "references"] = "distilled"
    """Where target lengths (and the alpha term's targets) come from."""
    head_memory: Literal["keep", "recompute"] = "keep"
    """keep: the (rows, vocabulary) logits of student and teacher stay for the backward pass, once each; recompute: they
    exist for one tile of rows at a time, for 11 products with the vocabulary's matrices instead of 7."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the frozen teacher; default: the student's."""
    teacher_placement: Literal["replicated", "sharded"] = "replicated"
    """replicated: whole on every rank; sharded: ZeRO-3 over the ranks, for a teacher larger than a device."""
    teacher_compile: bool = False
    """torch.compile the teacher's stacks; needs teacher_placement: replicated."""
    teacher_dropout: bool = False
    """Keep the teacher's dropout on while scoring."""
    teacher_checkpointing: bool = False
    """Recompute the teacher's decoder blocks in the backward pass."""

    @model_validator(mode="after")
    def _teacher_fits_placement(self) -> EngineConfig:
        if self.teacher_placement == "sharded" and self.teacher_compile:
            raise ValueError("teacher_compile = true needs teacher_placement = replicated")
        if self.teacher_placement == "sharded" and self.ensemble:
            raise ValueError("ensemble needs teacher_placement = replicated")
        if self.predicted_lengths and self.cross_entropy_weight:
            raise ValueError("predicted_lengths = true has no targets for cross_entropy_weight: set it to 0")
        return self
