"""Options of run, whose sections are the options of other commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.base import FOLD, Config, FoldOrAll, LogFolder, StageConfig
from pipeline.config.datasets import ConvertConfig, SynthConfig
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.predictions import DetectAnomalyConfig, SegmentConfig
from pipeline.config.review import OverlayConfig, ReportConfig
from pipeline.config.trainings import (
    FinetuneClassifierConfig,
    FinetuneSamConfig,
    FinetuneYoloConfig,
)

SECTIONS: dict[str, type[StageConfig]] = {  # of a run: the options of one stage each
    "synth": SynthConfig,
    "convert": ConvertConfig,
    "finetune_yolo": FinetuneYoloConfig,
    "finetune_sam": FinetuneSamConfig,
    "finetune_classifier": FinetuneClassifierConfig,
    "detect_anomaly": DetectAnomalyConfig,
    "segment": SegmentConfig,
    "evaluate": EvaluateConfig,
    "overlay": OverlayConfig,
    "report": ReportConfig,
}


def _options_of(section: str) -> AfterValidator:
    """Check a section as its command would; what links it to other stages may be left out."""
    cls = SECTIONS[section]
    links = {
        name: "filled in later" for name, info in cls.model_fields.items() if info.is_required()
    }

    def check(options: dict[str, Any]) -> dict[str, Any]:
        cls.model_validate({**links, **options})
        return options

    return AfterValidator(check)


class RunConfig(Config):
    """Run the stages of a configuration in order, skipping what is up to date."""

    positional: ClassVar[tuple[str, ...]] = ("config",)
    out: Path = Field(description="folder for the results of all stages")
    init: str | None = Field(
        None, description="starting point of the detector (finetune_yolo.model)"
    )
    mvtec_root: Path = Field(
        default_factory=lambda: Path(os.environ.get("PIPELINE_MVTEC_ROOT") or "datasets/mvtec_ad"),
        description="folder of the MVTec categories: convert.source is one of them",
    )
    fold: FoldOrAll = Field(
        None,
        description="fold of the dataset for all stages, under fold<K>/; 'all': each of them, and "
        "one evaluation of all images",
    )
    tensorboard: LogFolder = Field(
        None, description="folder of TensorBoard's event files, of all trainings and the evaluation"
    )
    mlflow: LogFolder = Field(None, description="folder of MLflow's file store, of the same")
    # The sections hold the options of the command of the same name; what links one stage to the
    # next (data, out, ...) is filled in by pipeline/plan.py.
    synth: Annotated[dict[str, Any], _options_of("synth")] | None = None
    convert: Annotated[dict[str, Any], _options_of("convert")] = Field(default_factory=dict)
    finetune_yolo: Annotated[dict[str, Any], _options_of("finetune_yolo")] = Field(
        default_factory=dict
    )
    finetune_sam: Annotated[dict[str, Any], _options_of("finetune_sam")] | None = (
        None  # None: use segment.sam as it is
    )
    finetune_classifier: dict[
        str, Annotated[dict[str, Any], _options_of("finetune_classifier")]
    ] = Field(default_factory=dict)  # by name
    detect_anomaly: Annotated[dict[str, Any], _options_of("detect_anomaly")] | None = (
        None  # None: decide by the boxes alone
    )
    segment: Annotated[dict[str, Any], _options_of("segment")] = Field(default_factory=dict)
    evaluate: Annotated[dict[str, Any], _options_of("evaluate")] = Field(default_factory=dict)
    overlay: Annotated[dict[str, Any], _options_of("overlay")] = Field(default_factory=dict)
    report: Annotated[dict[str, Any], _options_of("report")] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_links(self) -> RunConfig:
        if self.synth is None and "source" not in self.convert:
            raise ValueError(
                "convert.source: expected a category, or a section synth, found neither"
            )
        if self.synth is not None and "source" in self.convert:
            raise ValueError("convert.source: expected none beside a section synth, found one")
        if self.finetune_sam is not None and "sam" in self.segment:
            raise ValueError("segment.sam: expected none beside a section finetune_sam, found one")
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> RunConfig:
        if self.fold != "all":
            return self
        if not self.convert.get("folds"):
            raise ValueError("convert.folds: expected 2 or more for fold all, found none")
        if self.evaluate.get("split", "test") != "test":
            found = self.evaluate["split"]
            raise ValueError(f"evaluate.split: expected 'test' for fold all, found {found!r}")
        per_fold = {"finetune_yolo": self.finetune_yolo, "segment": self.segment}
        per_fold |= {"finetune_sam": self.finetune_sam or {}}
        per_fold |= {"detect_anomaly": self.detect_anomaly or {}}
        per_fold |= {f"finetune_classifier.{k}": v for k, v in self.finetune_classifier.items()}
        for section, options in per_fold.items():
            if FOLD not in str(options.get("out", FOLD)):
                raise ValueError(
                    f"{section}.out: expected a path with {FOLD} for fold all, "
                    f"found {options['out']}"
                )
        return self
