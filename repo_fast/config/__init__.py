"""Every option once: the sections, a configuration for each job, and how a command line becomes one."""

from repo_fast.config.certify import (
    OF_SUITES,
    STATEMENTS,
    CertifyConfig,
    ClaimConfig,
    Statement,
    certified_policy,
    stated,
)
from repo_fast.config.command_line import (
    CONFIG_FOLDER,
    find_config,
    known_keys,
    parse,
    read_config_file,
    to_dict,
    to_yaml,
)
from repo_fast.config.constraints import ONLY, ConstraintConfig, CostConfig, PidConfig, by_column, section_of
from repo_fast.config.evaluate import EvaluateConfig
from repo_fast.config.heads import HeadConfig
from repo_fast.config.judge import EndpointConfig, JudgeConfig, RubricConfig
from repo_fast.config.score import LAYOUTS, PreferenceDataConfig, PreferenceLossConfig, ScoreConfig
from repo_fast.config.sections import (
    CheckpointConfig,
    CriticConfig,
    EngineConfig,
    GuardConfig,
    JobConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    ScorerConfig,
)
from repo_fast.config.sft import SftConfig, SftDataConfig
from repo_fast.config.suites import REFUSED, SUITES, RefusalConfig, SuitesConfig
from repo_fast.config.supervised import SupervisedConfig
from repo_fast.config.train import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    RolloutConfig,
    TrainConfig,
    UpdateConfig,
)

__all__ = [
    "CONFIG_FOLDER",
    "LAYOUTS",
    "OF_SUITES",
    "ONLY",
    "REFUSED",
    "STATEMENTS",
    "SUITES",
    "AlgorithmConfig",
    "CertifyConfig",
    "CheckpointConfig",
    "ClaimConfig",
    "ConstraintConfig",
    "CostConfig",
    "CriticConfig",
    "DataConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "GuardConfig",
    "HeadConfig",
    "JobConfig",
    "JudgeConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PidConfig",
    "PreferenceDataConfig",
    "PreferenceLossConfig",
    "RefusalConfig",
    "RolloutConfig",
    "RubricConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "ScorerConfig",
    "SftConfig",
    "SftDataConfig",
    "Statement",
    "SuitesConfig",
    "SupervisedConfig",
    "TrainConfig",
    "UpdateConfig",
    "by_column",
    "certified_policy",
    "find_config",
    "known_keys",
    "parse",
    "read_config_file",
    "section_of",
    "stated",
    "to_dict",
    "to_yaml",
]
