"""Options of what makes datasets, or takes them to other tools: synth, convert, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.config.base import Fraction, PositiveInt, Seed, StageConfig


class SynthConfig(StageConfig):
    """Render a synthetic dataset in MVTec layout."""

    product: Literal["transistor", "leather", "parts"] = Field(
        "transistor", description="what is rendered; parts: a broad set to pretrain on"
    )
    train_good: PositiveInt = Field(60, description="good images in train/good")
    test_good: PositiveInt = Field(20, description="good images in test/good")
    per_defect: PositiveInt = Field(20, description="images of each of the product's defects")
    size: int = Field(320, ge=64, description="width and height in pixels")
    seed: Seed = Field(0, description="seed of everything random")


class ConvertConfig(StageConfig):
    """Turn MVTec masks into YOLO boxes and COCO masks per defect class."""

    inputs: ClassVar[tuple[str, ...]] = ("source",)
    source: Path = Field(description="an MVTec category, or a folder of categories")
    split: Literal["fractions", "study"] = Field(
        "fractions", description="'fractions', or 'study': 250 training and 63 test images"
    )
    fractions: tuple[Fraction, Fraction, Fraction] = Field(
        (0.7, 0.1, 0.2), description="train, val and test part of each class"
    )
    folds: int = Field(0, ge=0, description="also write K folds for cross-validation (0: none)")
    unseen: tuple[str, ...] = Field(
        (),
        description="classes that nothing is learned of: all their images are in the test split; "
        "in folds each is tested once, and is in no train or val split",
    )
    seed: Seed = Field(0, description="seed of the splits")
    one_per_image: tuple[str, ...] = Field(
        ("misplaced",), description="classes whose mask is one instance per image"
    )
    min_area: int = Field(
        16, ge=0, description="a component under this many pixels joins its nearest neighbour"
    )
    link: Literal["hardlink", "symlink", "copy"] = Field(
        "hardlink",
        description="how images get into the dataset (a hard link may fall back to copy)",
    )
    skip_bad: bool = Field(False, description="leave bad files out and record them")

    @field_validator("fractions")
    @classmethod
    def _check_fractions(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"expected a sum of 1, found {sum(fractions):g}")
        if fractions[0] == 0:
            raise ValueError("expected a training part above 0, found 0")
        return fractions

    @field_validator("folds")
    @classmethod
    def _check_folds(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("expected 0 or at least 2, found 1")
        return folds


ExchangeFormat = Literal["cvat", "label-studio", "fiftyone", "coco", "yolo-seg", "datumaro"]
Link = Literal["hardlink", "symlink", "copy"]


class ExportConfig(StageConfig):
    """Write labels or predictions for annotation tools and other libraries."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "predictions")
    data: Path = Field(description="dataset folder written by `pipeline convert`")
    to: ExchangeFormat = Field(
        description="format; all hold masks to the pixel but yolo-seg, whose polygons' loss is "
        "printed"
    )
    predictions: Path | None = Field(
        None,
        description="output folder of `pipeline segment`: its images alone, with what was found "
        "on them instead of their labels, for people to correct",
    )
    threshold: Fraction = Field(0.25, description="score from which a prediction is written")
    link: Link = Field(
        "hardlink",
        description="how images get into the folder (a hard link may fall back to copy)",
    )


class ImportConfig(StageConfig):
    """Make a new version of a dataset from labels that people corrected."""

    inputs: ClassVar[tuple[str, ...]] = ("source", "data")
    from_: ExchangeFormat = Field(description="format of the labels")
    source: Path = Field(description="file, folder or ZIP file that the annotation tool has saved")
    data: Path = Field(
        description="dataset folder whose images were labelled; it stays as it is, and images that "
        "the source lacks keep their labels"
    )
    out: Path = Field(description="folder for the new dataset: same images, ids, splits and folds")
    link: Link = Field(
        "hardlink",
        description="how images get into the dataset (a hard link may fall back to copy)",
    )
