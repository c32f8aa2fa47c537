"""One typed schema for everything a user can set."""

from engine_fast.config.data import DataConfig, FilterConfig, SyntheticConfig, TextPair, VocabularyConfig
from engine_fast.config.load import config_tree, dump_config, find_config, load_config, parse_config
from engine_fast.config.model import (
    AnyArchitecture,
    Architecture,
    LSTMArchitecture,
    StudentArchitecture,
    TaggerArchitecture,
    TeacherArchitecture,
)
from engine_fast.config.run import DistillConfig, EvaluateConfig, RunConfig, RuntimeConfig
from engine_fast.config.sweep import SweepConfig
from engine_fast.config.training import (
    ROUNDING_ONLY,
    BatchConfig,
    CMLMConfig,
    EarlyStopConfig,
    EngineConfig,
    EnsembleMember,
    OffloadConfig,
    OptimConfig,
    PretrainedConfig,
    TeacherConfig,
    TemperatureSchedule,
    TrainConfig,
)

__all__ = [
    "ROUNDING_ONLY",
    "AnyArchitecture",
    "Architecture",
    "BatchConfig",
    "CMLMConfig",
    "DataConfig",
    "DistillConfig",
    "EarlyStopConfig",
    "EngineConfig",
    "EnsembleMember",
    "EvaluateConfig",
    "FilterConfig",
    "LSTMArchitecture",
    "OffloadConfig",
    "OptimConfig",
    "PretrainedConfig",
    "RunConfig",
    "RuntimeConfig",
    "StudentArchitecture",
    "SweepConfig",
    "SyntheticConfig",
    "TaggerArchitecture",
    "TeacherArchitecture",
    "TeacherConfig",
    "TemperatureSchedule",
    "TextPair",
    "TrainConfig",
    "VocabularyConfig",
    "config_tree",
    "dump_config",
    "find_config",
    "load_config",
    "parse_config",
]
