"""Every option once: the sections, a configuration for each job, and how a command line becomes one."""

from repo_fast.config.command_line import CONFIG_FOLDER, find_config, known_keys, parse, to_dict, to_yaml
from repo_fast.config.score import LAYOUTS, PreferenceDataConfig, PreferenceLossConfig, ScoreConfig
from repo_fast.config.sections import (
    CheckpointConfig,
    CriticConfig,
    EngineConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from repo_fast.config.sft import SftConfig, SftDataConfig
from repo_fast.config.supervised import SupervisedConfig
from repo_fast.config.train import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    RolloutConfig,
    ScorerConfig,
    TrainConfig,
    UpdateConfig,
)

__all__ = [
    "CONFIG_FOLDER",
    "LAYOUTS",
    "AlgorithmConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceDataConfig",
    "PreferenceLossConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoreConfig",
    "ScorerConfig",
    "SftConfig",
    "SftDataConfig",
    "SupervisedConfig",
    "TrainConfig",
    "UpdateConfig",
    "find_config",
    "known_keys",
    "parse",
    "to_dict",
    "to_yaml",
]
