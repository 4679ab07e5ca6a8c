"""Every choice of a run, typed once: one class serves the command line, YAML files, Prefect's form and the workers."""

from pipelines.config.data import DataConfig, NormalizationChoice
from pipelines.config.evaluation import EvaluationConfig
from pipelines.config.loss import SMALLEST_MS_SSIM, LossConfig
from pipelines.config.model import LAMBDA_STEP_SQUARED, LARGEST_STEP, SMALLEST_STEP, ModelConfig
from pipelines.config.run import RootPath, RunConfig
from pipelines.config.section import Section
from pipelines.config.training import MOST_STEPS, CountOrAuto, TrainingConfig

__all__ = [
    "LAMBDA_STEP_SQUARED",
    "LARGEST_STEP",
    "MOST_STEPS",
    "SMALLEST_MS_SSIM",
    "SMALLEST_STEP",
    "CountOrAuto",
    "DataConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "NormalizationChoice",
    "RootPath",
    "RunConfig",
    "Section",
    "TrainingConfig",
]
