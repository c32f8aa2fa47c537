"""One typed schema for everything a user can set."""

from engine_fast.config.data import DataConfig, FilterConfig, SyntheticConfig, TextPair, VocabularyConfig
from engine_fast.config.load import dump_config, load_config, parse_config
from engine_fast.config.model import Architecture
from engine_fast.config.run import DistillConfig, EvaluateConfig, RunConfig, RuntimeConfig
from engine_fast.config.training import (
    ROUNDING_ONLY,
    BatchConfig,
    CMLMConfig,
    EarlyStopConfig,
    EngineConfig,
    OffloadConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "ROUNDING_ONLY",
    "Architecture",
    "BatchConfig",
    "CMLMConfig",
    "DataConfig",
    "DistillConfig",
    "EarlyStopConfig",
    "EngineConfig",
    "EvaluateConfig",
    "FilterConfig",
    "OffloadConfig",
    "OptimConfig",
    "RunConfig",
    "RuntimeConfig",
    "SyntheticConfig",
    "TeacherConfig",
    "TextPair",
    "TrainConfig",
    "VocabularyConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
