"""The experiment as frozen models, read and validated once, on entry. Neither torch nor ray is imported here."""

from craft_ray.config.about import AboutConfig
from craft_ray.config.adapter import AdapterConfig
from craft_ray.config.comparison import CompareConfig
from craft_ray.config.data import (
    ENDINGS,
    INSTRUCTION,
    AutoData,
    Columns,
    CsvData,
    DataConfig,
    HuggingFaceData,
    JsonLinesData,
    LeRobotData,
    ParquetData,
    TableData,
    TextData,
    as_format,
    ending,
    recognised,
)
from craft_ray.config.differences import deciding_difference, deciding_settings, differences
from craft_ray.config.evaluation import (
    EvalSet,
    EvaluationConfig,
    FunctionEvalSet,
    HarnessConfig,
    HarnessEvalSet,
    LikelihoodEvalSet,
    NumericEvalSet,
    PlainEvalSet,
    RegexEvalSet,
    RolloutConfig,
    RolloutEvalSet,
    SampleEvalSet,
    ValidationConfig,
)
from craft_ray.config.experiment import Experiment, parse_config
from craft_ray.config.loading import dump_config, load_config
from craft_ray.config.mixture import MixedData, Mixture, TaskConfig
from craft_ray.config.model import ModelConfig
from craft_ray.config.overrides import parse_overrides
from craft_ray.config.paths import SQLITE, matching
from craft_ray.config.plain_yaml import read_yaml
from craft_ray.config.retention import AnchorsConfig, CraftConfig, LogitsConfig
from craft_ray.config.schema import json_schema
from craft_ray.config.search import ObjectiveConfig, SweepConfig
from craft_ray.config.skills import SkillConfig, batch_sizes, scores_of
from craft_ray.config.tracking import TrackingConfig
from craft_ray.config.training import TrainConfig, WorkersConfig
from craft_ray.config.types import ARMS, BOUND, MOST_VARIANTS, POSITIONS, Precision, Section

__all__ = [
    "ARMS",
    "BOUND",
    "ENDINGS",
    "INSTRUCTION",
    "MOST_VARIANTS",
    "POSITIONS",
    "SQLITE",
    "AboutConfig",
    "AdapterConfig",
    "AnchorsConfig",
    "AutoData",
    "Columns",
    "CompareConfig",
    "CraftConfig",
    "CsvData",
    "DataConfig",
    "EvalSet",
    "EvaluationConfig",
    "Experiment",
    "FunctionEvalSet",
    "HarnessConfig",
    "HarnessEvalSet",
    "HuggingFaceData",
    "JsonLinesData",
    "LeRobotData",
    "LikelihoodEvalSet",
    "LogitsConfig",
    "MixedData",
    "Mixture",
    "ModelConfig",
    "NumericEvalSet",
    "ObjectiveConfig",
    "ParquetData",
    "PlainEvalSet",
    "Precision",
    "RegexEvalSet",
    "RolloutConfig",
    "RolloutEvalSet",
    "SampleEvalSet",
    "Section",
    "SkillConfig",
    "SweepConfig",
    "TableData",
    "TaskConfig",
    "TextData",
    "TrackingConfig",
    "TrainConfig",
    "ValidationConfig",
    "WorkersConfig",
    "as_format",
    "batch_sizes",
    "deciding_difference",
    "deciding_settings",
    "differences",
    "dump_config",
    "ending",
    "json_schema",
    "load_config",
    "matching",
    "parse_config",
    "parse_overrides",
    "read_yaml",
    "recognised",
    "scores_of",
]
