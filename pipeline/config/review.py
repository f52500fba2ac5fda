"""Options of what people review results with: overlay, report, apply-review."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.base import (
    FoldOrAll,
    Fraction,
    PositiveFloat,
    PositiveInt,
    SplitName,
    StageConfig,
    check_split_of_all,
    listed,
)


class OverlayConfig(StageConfig):
    """Make a review video of truth and predictions."""

    inputs: ClassVar[tuple[str, ...]] = (
        "source", "images", "predictions", "evaluation", "heat_maps",
    )  # fmt: skip
    out: Path = Field(
        description="the video, ending in .mp4, .webm or .gif, or a folder for numbered PNGs"
    )
    source: Path = Field(
        description="dataset folder, COCO file (.json), folder of images, or video"
    )
    images: Path | None = Field(
        None, description="folder of a COCO file's images (default: searched beside the file)"
    )
    predictions: Path | None = Field(
        None,
        description="output folder of `pipeline segment`, or a COCO results file with the image "
        "ids of the dataset or COCO file",
    )
    evaluation: Path | None = Field(
        None, description="output folder of `pipeline evaluate`: its figures go on the title card"
    )
    heat_maps: Path | None = Field(
        None,
        description="output folder of `pipeline detect-anomaly`, or of `pipeline segment "
        "--anomaly`: its heat maps have a panel of their own; of all folds, with '{fold}' for the "
        "number of the fold",
    )
    title: str | None = Field(
        None,
        description="name on the title card (default: that of the folder the video is in)",
    )
    title_seconds: float = Field(
        3.0, ge=0, description="how long the title card stays (0: no title card)"
    )
    split: SplitName = Field("test", description="split of a dataset")
    fold: FoldOrAll = Field(
        None,
        description="fold of the dataset instead of its single split; 'all': the test images of "
        "all folds",
    )
    layout: Literal["side-by-side", "prediction", "truth", "blink"] = Field(
        "side-by-side",
        description="truth beside prediction, either alone, or both in turn; what is not known is "
        "left out (in turn: the bare image)",
    )
    order: Literal["file", "class", "score", "worst"] | None = Field(
        None,
        description="file, class, score (the highest first) or worst (first) (default: class, or "
        "file where no truth is known); a video keeps its own",
    )
    only: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (),
        description="'errors': images with a miss, a wrong class or a false alarm; 'class=NAME': "
        "those that show the class, in truth or prediction, or class=good (both: errors of it)",
    )
    threshold: Fraction | None = Field(
        None,
        description="score from which a box is drawn (default: that of the image's fold in pooled "
        "predictions, else 0.25)",
    )
    inset: bool = Field(True, description="show small defects enlarged in a corner")
    seconds_per_image: PositiveFloat = Field(1.0, description="how long an image stays")
    fps: PositiveFloat | None = Field(
        None,
        le=240,
        description="frames per second (default: that of a video, about 10 for images)",
    )
    height: int = Field(640, ge=64, le=2160, description="height of each panel in pixels")

    @field_validator("only")
    @classmethod
    def _check_only(cls, only: tuple[str, ...]) -> tuple[str, ...]:
        for item in only:
            if item != "errors" and not re.fullmatch("class=.+", item):
                raise ValueError(f"expected 'errors' or 'class=NAME', found {item!r}")
        return only

    @model_validator(mode="after")
    def _check_all(self) -> OverlayConfig:
        if self.fold == "all":
            check_split_of_all(self.split)
        if self.images is not None and self.source.suffix.lower() != ".json":
            raise ValueError(f"--images: expected a COCO file as --source, found {self.source}")
        return self


class ReportConfig(StageConfig):
    """Make a page to review results in: figures, thresholds, every image, the video."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    of_run: ClassVar[tuple[str, ...]] = ("data", "predictions", "evaluation", "video")
    inputs: ClassVar[tuple[str, ...]] = (*of_run, "heat_maps")
    run: Path | None = Field(
        None, description="output folder of `pipeline run`, in place of the four inputs below"
    )
    out: Path = Field(  # type: ignore[assignment]  # the stage fills it in
        None, description="folder for the page, index.html (default: report, in the run's folder)"
    )
    data: Path | None = Field(None, description="dataset folder written by `pipeline convert`")
    predictions: Path | None = Field(
        None,
        description="the output folder of `pipeline segment` that was evaluated; of all folds, "
        "out_of_fold in the evaluation's folder",
    )
    evaluation: Path | None = Field(None, description="output folder of `pipeline evaluate`")
    video: Path | None = Field(
        None, description="video of `pipeline overlay`, .mp4 or .webm (none: the page has none)"
    )
    heat_maps: Path | None = Field(
        None,
        description="output folder of `pipeline detect-anomaly` on the dataset, or of `pipeline "
        "segment --anomaly`, to look at beside the predictions; of all folds, with '{fold}' for "
        "the number of the fold",
    )
    title: str | None = Field(
        None, description="name on the page (default: that of the folder the page's folder is in)"
    )
    single_file: bool = Field(
        False, description="put pictures and video into index.html: one file to pass on"
    )
    side: PositiveInt = Field(
        1280, description="longest side of a picture in pixels: larger images are reduced"
    )


class ApplyReviewConfig(StageConfig):
    """Make a new version of a dataset from what a person said of predictions."""

    positional: ClassVar[tuple[str, ...]] = ("review",)
    inputs: ClassVar[tuple[str, ...]] = ("review", "data", "images", "sam")
    review: Path = Field(description="review.json that was saved from the report page")
    data: Path = Field(description="dataset folder whose labels are corrected; it stays as it is")
    images: Path | None = Field(
        None,
        description="folder of reviewed images that are not in the dataset yet: they join its "
        "training images",
    )
    conflicts: Literal["report", "keep-labels", "take-review"] = Field(
        "report",
        description="where review and labels contradict each other, or the review itself: name it "
        "and write nothing, leave the labels as they are, or do as the review says",
    )
    sam: str = Field(
        "sam-lite",
        description="what turns drawn boxes into masks: a name of `pipeline weights list` or a "
        "checkpoint",
    )
    device: str = Field("auto", description="auto, cpu, mps or 0")
    offline: bool = Field(False, description="never download")
