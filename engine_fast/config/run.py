"""The whole configuration of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from engine_fast.config.base import Section
from engine_fast.config.data import DataConfig
from engine_fast.config.sweep import SweepConfig, is_seed
from engine_fast.config.training import CMLMConfig, EngineConfig, TeacherConfig


class DistillConfig(Section):
    """Beam search of the teacher over the training sources."""

    beam: PositiveInt = 5
    """Hypotheses kept."""
    length_penalty: NonNegativeFloat = 1.0
    """Scores are divided by length to this power."""
    n_best: PositiveInt = 1
    """Translations written per source."""
    max_tokens: PositiveInt = 8192
    """Source tokens times beam per batch."""
    chunk_sentences: PositiveInt = 2000
    """Sentences per resumable chunk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the search."""


TableName = Literal["table2", "table3", "table4", "table5", "table6"]
SystemName = Literal[
    "teacher-greedy", "teacher-beam",
    "cmlm", "cmlm-rerank", "cmlm-oracle", "engine", "engine-rerank", "engine-oracle",
]  # fmt: skip


class EvaluateConfig(Section):
    """Which systems are measured, and how."""

    split: Literal["valid", "test"] = "test"
    """Evaluated split."""
    beam: PositiveInt = 5
    """Teacher beam."""
    length_penalty: NonNegativeFloat = 1.0
    """Teacher beam's length penalty."""
    iterations: list[PositiveInt] = Field(default=[1, 4, 10], min_length=1)
    """Mask-predict iterations of the students."""
    cmlm_length_beam: PositiveInt = 5
    """Length candidates of the CMLM baseline (paper: 5)."""
    engine_length_beam: PositiveInt = 3
    """Length candidates of the ENGINE student (paper: 3)."""
    oracle_lengths: bool = True
    """Also decode with the references' lengths."""
    rerank: bool = True
    """Also choose among length candidates by the teacher's energy."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of every decoding."""
    max_tokens: PositiveInt = 8192
    """Tokens per decoding batch."""
    latency_sentences: NonNegativeInt = 50
    """Sentences timed one by one for the batch-1 speed; 0 = none."""
    bootstrap_samples: NonNegativeInt = 1000
    """Resamples of the paired bootstrap; 0 = none."""
    systems: list[SystemName] | None = Field(default=None, min_length=1)
    """Only these, of the systems that the settings above make; default: all. A student of none is not trained."""

    @model_validator(mode="after")
    def _systems_exist(self) -> EvaluateConfig:
        for name in self.systems or ():
            role, _, variant = name.partition("-")
            beam = getattr(self, f"{role}_length_beam", 0)
            if variant == "oracle" and not self.oracle_lengths:
                raise ValueError(f"systems names {name}, which needs oracle_lengths: true")
            if variant == "rerank" and not (self.rerank and beam > 1):
                raise ValueError(f"systems names {name}, which needs rerank: true and {role}_length_beam above 1")
        return self


class RuntimeConfig(Section):
    """The process, not the model: nothing here changes results except within rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where torch sees one."""
    threads: NonNegativeInt = 0
    """CPU threads a process; 0 = torch's choice divided by the processes on this host."""
    collective_timeout_seconds: NonNegativeInt = 0
    """A rank that waits so long for the others ends with an error; 0 = torch's choice, 10 to 30 minutes."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    min_free_bytes: NonNegativeInt = 100_000_000
    """A checkpoint is refused when its disk would have less free than this afterwards."""


class RunConfig(Section):
    """One file under configs/: the whole path from text to report."""

    name: str = "run"
    """Shown in the report."""
    seed: NonNegativeInt = 1
    """Of initialisation, data order, dropout, masks and noise."""
    data: DataConfig
    """Corpus."""
    teacher: TeacherConfig = TeacherConfig()
    """Stage 2."""
    distill: DistillConfig = DistillConfig()
    """Stage 3."""
    cmlm: CMLMConfig = CMLMConfig()
    """Stage 4."""
    engine: EngineConfig = EngineConfig()
    """Stage 5."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage 6."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device and threads."""
    sweep: SweepConfig | None = None
    """Try variations of the run instead of the run itself."""
    table: TableName | None = None
    """Make this table of the paper from what is measured."""
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed's own config, merged into the generated one; unknown ones are refused."""

    @model_validator(mode="after")
    def _no_seed_twice(self) -> RunConfig:
        for key, values in (self.sweep.grid if self.sweep else {}).items():
            if (is_seed(key) or key == "teacher.seed") and None in values and self.seed in values:
                raise ValueError(
                    f"sweep.grid.{key} has a seed twice: {values}, and null is the run's, {self.seed}. Take one out"
                )
        return self
