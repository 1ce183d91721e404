"""The settings of a run, as plain data."""

from lazyattn.experiment.config import (
    ExperimentConfig,
    check_override,
    defaults,
    from_config_dict,
    model_from_dict,
    resumption_changes,
    with_attention,
)
from lazyattn.experiment.teaching import TeachingConfig
from lazyattn.experiment.training import OptimizerConfig, TrainingConfig

__all__ = [
    "ExperimentConfig",
    "OptimizerConfig",
    "TeachingConfig",
    "TrainingConfig",
    "check_override",
    "defaults",
    "from_config_dict",
    "model_from_dict",
    "resumption_changes",
    "with_attention",
]
