"""Every command's options: the only place where an option, its default and its check are written.

A configuration is a YAML file overridden by flags. It is checked as a whole, and all problems are
reported together. The files, with the commands whose options they hold:

    datasets      synth, convert, export, import
    trainings     finetune-yolo, finetune-sam, finetune-classifier, finetune-head
    predictions   detect-anomaly, segment, measure
    evaluation    evaluate
    review        overlay, report, apply-review
    run           run
    weights       weights

`base` has what they share, and `reading` makes a configuration of files and flags.
"""

from pipeline.config.base import (
    FOLD,
    Config,
    LoggedConfig,
    PositiveInt,
    SplitName,
    StageConfig,
    flag_of,
    of_fold,
)
from pipeline.config.datasets import ConvertConfig, ExportConfig, ImportConfig, SynthConfig
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.predictions import DetectAnomalyConfig, MeasureConfig, SegmentConfig
from pipeline.config.reading import EXPECTED, build, read_yaml
from pipeline.config.review import ApplyReviewConfig, OverlayConfig, ReportConfig
from pipeline.config.run import SECTIONS, RunConfig
from pipeline.config.trainings import (
    FinetuneClassifierConfig,
    FinetuneHeadConfig,
    FinetuneSamConfig,
    FinetuneYoloConfig,
    TrainConfig,
)
from pipeline.config.weights import WeightsConfig

__all__ = [
    "EXPECTED",
    "FOLD",
    "SECTIONS",
    "ApplyReviewConfig",
    "Config",
    "ConvertConfig",
    "DetectAnomalyConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneClassifierConfig",
    "FinetuneHeadConfig",
    "FinetuneSamConfig",
    "FinetuneYoloConfig",
    "ImportConfig",
    "LoggedConfig",
    "MeasureConfig",
    "OverlayConfig",
    "PositiveInt",
    "ReportConfig",
    "RunConfig",
    "SegmentConfig",
    "SplitName",
    "StageConfig",
    "SynthConfig",
    "TrainConfig",
    "WeightsConfig",
    "build",
    "flag_of",
    "of_fold",
    "read_yaml",
]
