"""Options of what predicts: detect-anomaly, segment, and measure for what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import (
    ANOMALY_THRESHOLD,
    Cache,
    CacheSize,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Seed,
    SplitName,
    StageConfig,
    Zoom,
    listed,
)


class DetectAnomalyConfig(StageConfig):
    """Learn from good images alone; score all others, with heat maps."""

    inputs: ClassVar[tuple[str, ...]] = ("source",)
    source: Path = Field(
        description="an MVTec category: its train/good is learned, its test scored; or a dataset "
        "folder: the good training images are learned, the val and test splits scored"
    )
    fold: int | None = Field(
        None, ge=0, description="fold of the dataset instead of its single split"
    )
    method: Literal[
        "cosine", "mahalanobis", "padim", "patchcore", "rotation", "cutpaste", "simclr", "moco"
    ] = Field(
        "patchcore",
        description="distance of an image's mean features (cosine, mahalanobis) or of its patches "
        "(padim: a part always lies in one place; patchcore); the others train a network first, to "
        "tell quarter turns (rotation) or pasted patches (cutpaste), or to find an image's other "
        "view (simclr, moco)",
    )
    image_size: int = Field(
        224, ge=32, multiple_of=32, description="width and height the method sees, in pixels"
    )
    coreset: float = Field(
        0.01, gt=0, le=1, description="part of the good patches that patchcore keeps"
    )
    epochs: PositiveInt | None = Field(
        None, description="passes of a training over the good images (default: the method's own)"
    )
    seed: Seed = Field(0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, mps or 0")


class SegmentConfig(StageConfig):
    """Let SAM refine boxes into pixel masks."""

    inputs: ClassVar[tuple[str, ...]] = ("source", "boxes", "sam", "anomaly")
    source: Path = Field(description="dataset folder, folder of images, or video")
    splits: tuple[SplitName, ...] = Field(("val", "test"), description="splits of a dataset")
    fold: int | None = Field(
        None, ge=0, description="fold of the dataset instead of its single split"
    )
    boxes: str = Field(description="detector checkpoint, COCO results file, or 'truth'")
    prompt: Literal["boxes", "points", "boxes+points", "masks", "boxes+masks"] = Field(
        "boxes",
        description="what SAM is shown: each box, its points (by default its centre; 'points' of "
        "the COCO results file), or the mask in the COCO results file",
    )
    sam: str = Field("sam-lite", description="a name of `pipeline weights list` or a checkpoint")
    zoom: Zoom | None = Field(
        None,
        description="side of the window around a box, in box sizes (0: whole image; "
        "default: what the SAM was trained with)",
    )
    image_size: PositiveInt | None = Field(
        None, description="longest side the detector sees (default: what it was trained with)"
    )
    scales: Annotated[tuple[PositiveFloat, ...], BeforeValidator(listed)] = Field(
        (0.85, 1.0, 1.15),
        min_length=1,
        description="at which parts of that size a detector looks at an image: the scores of what "
        "it finds are averaged",
    )
    min_score: Fraction = Field(
        0.01,
        description="leave out boxes to which the detector gives less than this score at a look",
    )
    max_boxes: PositiveInt = Field(50, description="most boxes per image, best first")
    flip: bool = Field(
        True,
        description="average with the boxes and masks of the mirror image: better, in twice the "
        "time",
    )
    overlaps: Literal["keep", "resolve"] = Field(
        "keep",
        description="'resolve': a pixel in several masks of one class stays in that with the "
        "highest score (of equal ones, the earliest), which may leave a mask empty",
    )
    clean_below: int = Field(
        0,
        ge=0,
        description="remove islands and fill holes of fewer pixels than this; the largest island "
        "always stays",
    )
    rescore: bool = Field(
        True,
        description="multiply the scores of a detector by the quality of the masks: SAM, which "
        "sees every box enlarged, has a say in what is a defect",
    )
    fit_boxes: bool = Field(
        True,
        description="replace every box but a true one by the smallest box of its mask, if the two "
        "overlap well (IoU 0.5)",
    )
    masks: bool = Field(False, description="also write one mask PNG per image")
    review_below: Fraction | None = Field(
        None, description="list the masks under this quality in review.csv, worst first"
    )
    anomaly: Path | None = Field(
        None,
        description="output folder of `pipeline detect-anomaly`: its method also scores every "
        "image, for defects of no known class",
    )
    anomaly_threshold: float | None = Field(
        None, description=f"{ANOMALY_THRESHOLD} (default: the one that its run has chosen on val)"
    )
    cache: Cache = None
    cache_gb: CacheSize = 2.0
    device: str = Field("auto", description="auto, cpu, mps or 0")
    offline: bool = Field(False, description="never download")

    @model_validator(mode="after")
    def _check_anomaly(self) -> SegmentConfig:
        if self.anomaly_threshold is not None and self.anomaly is None:
            raise ValueError(
                "--anomaly-threshold: expected --anomaly beside it, "
                f"found {self.anomaly_threshold:g} alone"
            )
        return self

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str, info: ValidationInfo) -> str:
        if "masks" in prompt and not info.data.get("boxes", ".json").endswith(".json"):
            raise ValueError(f"expected boxes of a COCO results file for masks, found {prompt!r}")
        return prompt


class MeasureConfig(StageConfig):
    """Measure every predicted mask: size, orientation and place, as a CSV table."""

    inputs: ClassVar[tuple[str, ...]] = ("predictions",)
    out: Path = Field(description="the table, ending in .csv")
    predictions: Path = Field(description="output folder of `pipeline segment`")
    threshold: Fraction = Field(0.25, description="score from which a mask is measured")
    mm_per_px: PositiveFloat | None = Field(
        None, description="width and height of a pixel in mm: also give areas and lengths in mm"
    )
