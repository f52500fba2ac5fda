"""Every command's options: the only place where an option, its default and its check are written.

A configuration is a YAML file overridden by flags. It is checked as a whole, and all problems are
reported together.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _check_zoom(zoom: float) -> float:
    if 0 < zoom < 1:
        raise ValueError(f"expected 0 or at least 1, found {zoom:g}")
    return zoom


Zoom = Annotated[float, Field(ge=0), AfterValidator(_check_zoom)]
SplitName = Literal["train", "val", "test"]

FOLD = "{fold}"  # in a path: the number of the fold


def of_fold(path: Path, fold: int) -> Path:
    """A path with the number of a fold in place of `{fold}`."""
    return Path(str(path).replace(FOLD, str(fold)))


def _check_fold(fold: object) -> object:
    if fold is None or fold == "all" or str(fold).isdecimal():
        return fold
    raise ValueError(f"expected the number of a fold, or 'all', found {fold!r}")


FoldOrAll = Annotated[int | Literal["all"] | None, BeforeValidator(_check_fold)]

COSTS = ("miss", "false-alarm")


def _check_cost(cost: object) -> object:
    """'miss=50,false-alarm=1', or the same as keys and values."""
    if isinstance(cost, str):
        cost = dict(part.strip().partition("=")[::2] for part in cost.split(","))
    if cost is None:
        return None
    expected = "expected miss=COST,false-alarm=COST"
    if not isinstance(cost, dict) or sorted(cost) != sorted(COSTS):
        raise ValueError(f"{expected}, found {reprlib.repr(cost)}")
    try:
        numbers = {name: float(cost[name]) for name in COSTS}
    except (TypeError, ValueError):
        raise ValueError(f"{expected} with numbers, found {reprlib.repr(cost)}") from None
    if min(numbers.values()) < 0 or not 0 < sum(numbers.values()) < float("inf"):
        raise ValueError(f"{expected} of 0 or more, and not both 0, found {reprlib.repr(cost)}")
    return numbers


Cost = Annotated[dict[str, float], BeforeValidator(_check_cost)]

# Options whose default differs from training to training.
Epochs = Annotated[PositiveInt, Field(description="most passes over the training images")]
Patience = Annotated[
    PositiveInt, Field(description="stop after this many epochs without improvement")
]
Batch = Annotated[PositiveInt, Field(description="images (or boxes) per step")]
LearningRate = Annotated[PositiveFloat, Field(description="peak learning rate")]


def _check_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder, found the file {folder}")
    return folder


Folder = Annotated[Path, AfterValidator(_check_folder)]
LogFolder = Folder | None
Cache = Annotated[
    Folder | None,
    Field(description="folder that keeps what SAM's encoder computes for later runs, if any"),
]
CacheSize = Annotated[
    PositiveFloat, Field(description="GB in that folder; what was used longest ago goes")
]


class Config(BaseModel):
    """Base of all configurations: immutable, and unknown keys are errors."""

    # YAML makes a number of `device: 0`; inf and nan are never meant.
    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )
    positional: ClassVar[tuple[str, ...]] = ()  # fields given without a flag, in this order
    inputs: ClassVar[tuple[str, ...]] = ()  # fields that name files or folders to read


class StageConfig(Config):
    """What all stages share: where the results go, and whether to replace what is there."""

    out: Path = Field(description="folder for the results")
    force: bool = Field(False, description="replace an existing, different output")


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


class LoggedConfig(StageConfig):
    """What those share whose metrics and pictures TensorBoard and MLflow can show."""

    tensorboard: LogFolder = Field(None, description="folder of TensorBoard's event files, if any")
    mlflow: LogFolder = Field(None, description="folder of MLflow's file store, if any")


class TrainConfig(LoggedConfig):
    """What every training shares."""

    inputs: ClassVar[tuple[str, ...]] = ("data", "model")
    data: Path = Field(description="dataset folder written by `pipeline convert`")
    fold: int | None = Field(
        None, ge=0, description="fold of the dataset instead of its single split"
    )
    epochs: Epochs
    batch: Batch = 16
    lr: LearningRate
    seed: Seed = Field(0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, mps, 0 or, for several GPUs, 0,1")
    resume: bool = Field(False, description="go on from the last checkpoint of this output folder")


class FinetuneYoloConfig(TrainConfig):
    """Fine-tune YOLO-World for the dataset's classes."""

    model: str = Field(
        "yolov8s-worldv2",
        description="a name of `pipeline weights list`, a checkpoint (YOLO-World, or plain YOLOv8, "
        "which is converted), or yolov8{n,s,m,l,x}-worldv2.yaml for random weights",
    )
    prompts: dict[str, str] = Field(
        default_factory=dict, description="text prompt of each class (default: its name)"
    )
    text: Literal["auto", "clip", "learned"] = Field(
        "auto", description="prompt embeddings: from CLIP, learned, or CLIP where it can be had"
    )
    epochs: Epochs = 20
    lr: LearningRate = 5e-4
    image_size: PositiveInt = Field(416, description="longest side the detector sees, in pixels")
    augment: bool = Field(True, description="augment the training images")
    paste: Fraction = Field(
        0.5,
        description="part of the good training images that get defects of other training images "
        "pasted on them, if images are augmented",
    )
    free_pose: bool = Field(
        False, description="parts lie at any angle: paste defects anywhere they fit, turned at will"
    )
    defective: Fraction = Field(
        0.5,
        description="part of an epoch that shows defective images, each class as often as any "
        "other (0: every image once)",
    )
    shots: PositiveInt | None = Field(
        None,
        description="train on at most this many defective images of each class, and on all good "
        "ones (default: all)",
    )
    freeze_text: bool = Field(
        False,
        description="keep what gives a prompt its meaning: prompts, text attention, and the head's "
        "region embeddings and their comparison with the prompts stay as they are, the rest trains",
    )
    unseen_prompts: tuple[str, ...] = Field(
        ("object", "metal part", "screw", "hole", "person"),
        description="prompts that are not trained: what they find is reported beside what they "
        "found before (none: no report); needs CLIP",
    )
    offline: bool = Field(False, description="never download")


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


class FinetuneSamConfig(TrainConfig):
    """Fine-tune SAM's mask decoder on the boxes and masks of one or more datasets."""

    data: Annotated[tuple[Path, ...], BeforeValidator(_listed)] = Field(  # type: ignore[assignment]
        min_length=1, description="dataset folders written by `pipeline convert`"
    )
    model: str = Field("sam-lite", description="a name of `pipeline weights list` or a checkpoint")
    train: Literal["decoder", "neck", "lora", "all"] = Field(
        "decoder",
        description="the decoder alone, with the encoder's neck, with LoRA in the encoder's "
        "attention, or everything",
    )
    epochs: Epochs = 20
    batch: Batch = 8
    lr: LearningRate = 5e-4
    loss: Literal["bce", "focal"] = Field("bce", description="the term beside Dice")
    box_jitter: float = Field(
        0.1, ge=0, lt=0.5, description="shift of box sides, part of the box size"
    )
    free_pose: bool = Field(
        False,
        description="parts lie at any angle: train on quarter turns and mirror images as well",
    )
    zoom: Zoom = Field(
        1.3, description="side of the window around a box, in box sizes (0: whole image)"
    )
    repeats: PositiveInt = Field(4, description="jittered copies of every box per epoch")
    cache: Cache = None  # used with a frozen encoder alone
    cache_gb: CacheSize = 2.0
    offline: bool = Field(False, description="never download")


class FinetuneClassifierConfig(TrainConfig):
    """Train the image-classifier baseline."""

    model: Literal["resnet18", "resnet34", "resnet50", "efficientnet-lite0"] = Field(
        "resnet18", description="backbone"
    )
    pretrained: bool = Field(True, description="start from ImageNet weights")
    unfreeze: tuple[str, ...] = Field(
        (), description="train these parts of the backbone alone, e.g. layer4 fc (none: train all)"
    )
    epochs: Epochs = 50
    patience: Patience = 50
    lr: LearningRate = 1e-3
    optimizer: Literal["adam", "adamw"] = Field("adam", description="optimiser")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    balance: Literal["none", "sampling", "weights"] = Field(
        "none",
        description="show every class as often as any other (sampling), or let rare ones count "
        "more in the loss, by their effective number of images (weights)",
    )
    image_size: PositiveInt = Field(
        256, description="width and height the classifier sees, in pixels"
    )
    auto_augment: bool = Field(True, description="AutoAugment (ImageNet policy)")
    rotation: float = Field(
        0.0, ge=0, le=180, description="random rotation up to this many degrees"
    )
    offline: bool = Field(False, description="never download")


class FinetuneHeadConfig(LoggedConfig):
    """Fit a classifier on frozen ImageNet features, with a remedy for rare classes."""

    inputs: ClassVar[tuple[str, ...]] = ("data",)
    data: Path = Field(description="dataset folder written by `pipeline convert`")
    fold: int | None = Field(
        None, ge=0, description="fold of the dataset instead of its single split"
    )
    method: Literal["plain", "balanced-sampling", "balanced-weights", "ecrt"] = Field(
        "balanced-weights",
        description="what is done for rare classes: nothing (plain), every class is shown as often "
        "as any other, every class weighs according to its effective number of images, or new "
        "features are made of those there are (ecrt)",
    )
    augmentation: Literal["shuffle", "gaussian", "none"] = Field(
        "shuffle",
        description="how ecrt fills up rare classes: with shuffled sources, with sources drawn "
        "from the class's Gaussian, or with copies (none)",
    )
    image_size: int = Field(224, ge=32, description="width and height the network sees, in pixels")
    seed: Seed = Field(0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, mps or 0: where features are computed")
    cache: Folder | None = Field(
        None, description="folder that keeps the features for later runs, if any"
    )
    cache_gb: CacheSize = 2.0


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


ANOMALY_THRESHOLD = "anomaly score from which an image is anomalous"


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
    min_score: Fraction = Field(
        0.01, description="leave out boxes to which the detector gives less than this score"
    )
    max_boxes: PositiveInt = Field(50, description="most boxes per image, best first")
    flip: bool = Field(
        True, description="average with the masks of the mirror image: better, in twice the time"
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


class EvaluateConfig(LoggedConfig):
    """Measure boxes, masks and the image decision, or make one table of runs of any kind."""

    positional: ClassVar[tuple[str, ...]] = ("runs",)
    of_predictions: ClassVar[tuple[str, ...]] = (
        "predictions", "truth_boxes", "classifiers", "anomaly", "anomaly_threshold", "threshold",
        "cost", "review_below",
    )  # fmt: skip
    inputs: ClassVar[tuple[str, ...]] = (
        "data", "predictions", "truth_boxes", "classifiers", "anomaly", "runs",
    )  # fmt: skip
    runs: tuple[Path, ...] = Field(
        (),
        description="output folders of detect-anomaly, finetune-classifier, finetune-head and "
        "segment to compare, in place of --predictions",
    )
    data: Path = Field(description="dataset folder written by `pipeline convert`")
    predictions: Path | None = Field(
        None,
        description="output folder of `pipeline segment`; with --fold all, '{fold}' in a path is "
        "the number of the fold",
    )
    truth_boxes: Path | None = Field(
        None, description="output folder of `pipeline segment --boxes truth`: the upper bound"
    )
    classifiers: tuple[Path, ...] = Field(
        (), description="output folders of `pipeline finetune-classifier` or `finetune-head`"
    )
    anomaly: Path | None = Field(
        None,
        description="output folder of `pipeline detect-anomaly` on the same dataset: images it "
        "calls anomalous, and on which no box counts, are reported as unknown defects (default: "
        "the scores that the predictions have, if any)",
    )
    anomaly_threshold: float | None = Field(
        None, description=f"{ANOMALY_THRESHOLD} (default: the one chosen on val, by its run)"
    )
    fold: FoldOrAll = Field(
        None,
        description="fold of the dataset instead of its single split; 'all': every fold's test "
        "images, each with the predictions of its fold",
    )
    split: SplitName = Field("test", description="split that is measured")
    threshold: Fraction | None = Field(
        None, description="score from which a box counts (default: the best on the val split)"
    )
    cost: Cost | None = Field(
        None,
        description="what it costs to miss a defective image, and to raise an alarm on a good one, "
        "as in miss=50,false-alarm=1: the best threshold is then the cheapest, not that of the "
        "best F1",
    )
    review_below: Fraction | None = Field(
        None,
        description="quality under which a mask is for review (default: what lists every badly "
        "drawn mask of the val split)",
    )
    published: bool = Field(
        True, description="show the published rows of the study, if it had the same classes"
    )
    resamples: int = Field(
        1000, ge=0, description="bootstrap resamples for the intervals (0: none)"
    )
    seed: Seed = Field(0, description="seed of the bootstrap")

    @model_validator(mode="after")
    def _check_threshold(self) -> EvaluateConfig:
        if self.cost is not None and self.threshold is not None:
            raise ValueError(
                "--cost: expected no --threshold beside it, for it chooses one, "
                f"found {self.threshold:g}"
            )
        return self

    @model_validator(mode="after")
    def _check_runs(self) -> EvaluateConfig:
        given = (name for name in self.of_predictions if getattr(self, name) not in (None, ()))
        if self.runs and (name := next(given, None)):
            raise ValueError(
                f"{flag_of(EvaluateConfig, name)}: expected none beside runs to compare, "
                f"found {getattr(self, name)}"
            )
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> EvaluateConfig:
        if self.fold != "all":
            return self
        _check_split_of_all(self.split)
        folders = {"predictions": self.predictions, "truth_boxes": self.truth_boxes}
        folders |= {"anomaly": self.anomaly}
        for name in ("classifiers", "runs"):
            folders[name] = next((p for p in getattr(self, name) if FOLD not in str(p)), None)
        for name, folder in folders.items():
            if folder is not None and FOLD not in str(folder):
                flag = flag_of(EvaluateConfig, name)
                raise ValueError(
                    f"{flag}: expected a path with {FOLD} beside --fold all, found {folder}"
                )
        return self


class MeasureConfig(StageConfig):
    """Measure every predicted mask: size, orientation and place, as a CSV table."""

    inputs: ClassVar[tuple[str, ...]] = ("predictions",)
    out: Path = Field(description="the table, ending in .csv")
    predictions: Path = Field(description="output folder of `pipeline segment`")
    threshold: Fraction = Field(0.25, description="score from which a mask is measured")
    mm_per_px: PositiveFloat | None = Field(
        None, description="width and height of a pixel in mm: also give areas and lengths in mm"
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
    only: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
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
            _check_split_of_all(self.split)
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


def _check_split_of_all(split: SplitName) -> None:
    if split != "test":  # of the other splits, an image is in several folds
        raise ValueError(f"--split: expected 'test' beside --fold all, found {split!r}")


SECTIONS: dict[str, type[StageConfig]] = {  # of a run: the options of one stage each
    "synth": SynthConfig,
    "convert": ConvertConfig,
    "finetune_yolo": FinetuneYoloConfig,
    "finetune_sam": FinetuneSamConfig,
    "finetune_classifier": FinetuneClassifierConfig,
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
    # next (data, out, ...) is filled in by `plan` in pipeline/stages/run.py.
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
        per_fold |= {f"finetune_classifier.{k}": v for k, v in self.finetune_classifier.items()}
        for section, options in per_fold.items():
            if FOLD not in str(options.get("out", FOLD)):
                raise ValueError(
                    f"{section}.out: expected a path with {FOLD} for fold all, "
                    f"found {options['out']}"
                )
        return self


class WeightsConfig(Config):
    """List, fetch or verify pretrained weights."""

    positional: ClassVar[tuple[str, ...]] = ("action", "names")
    action: Literal["list", "pull", "verify"] = Field(description="list, pull or verify")
    names: tuple[str, ...] = Field((), description="names of the list (none: all; pull needs one)")
    offline: bool = Field(False, description="never download")


C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises `UserError` when it is missing, malformed or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a YAML file, found nothing there") from None
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file, found: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{path}: expected a YAML file, found: {detail}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def build(
    cls: type[C],
    values: Mapping[Any, Any],
    *,
    flags: Mapping[str, str] | None = None,
    file: Path | None = None,
    section: str = "",
) -> C:
    """Check `values` as a whole. Raises `UserError` with one line per problem.

    What names a key in a problem: `flags` has the flag of each key that came from the command line,
    `file` is where the others came from, and `section` the part of the file they stand in, with a
    dot at its end.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
    lines = []
    for problem in problems:
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        outer = (".".join(parts[: n + 1]) for n in range(len(parts)))
        given = next((flags[k] for k in outer if k in flags), None) if flags else None
        absent = file is None or problem["type"] == "missing"
        if given is None and absent and not section and key in cls.model_fields:
            given = flag_of(cls, key)
        name = given or (f"{file}: {section}{key}" if file is not None else f"{section}{key}")
        lines.append(_line(cls, name, problem))
    raise UserError(*lines)


def flag_of(cls: type[Config], field: str) -> str:
    """How the command line spells a field."""
    if field in cls.positional:
        return field
    return f"--{field.rstrip('_').replace('_', '-')}"  # one that Python wants for itself ends in _


EXPECTED = {  # of pydantic's types of problems, where its own words would not fit
    "path_type": "a path",
    "string_type": "text",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "too_long": "fewer values",
    "too_short": "more values",
    "missing": "more values",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def _line(cls: type[Config], name: str, problem: Any) -> str:
    """One problem as a line: where, what was expected, what was found."""
    kind, loc = problem["type"], problem["loc"]
    if kind in ("extra_forbidden", "invalid_key"):
        owner = SECTIONS.get(str(loc[0]), cls) if len(loc) > 1 else cls
        near = difflib.get_close_matches(str(loc[-1]), list(owner.model_fields), n=1)
        return f"{name}: unknown key" + (f", did you mean '{near[0]}'?" if near else "")
    if kind == "missing" and str(loc[-1]) in cls.model_fields:
        return f"{name}: required, not given"
    if (
        kind == "value_error"
    ):  # from a validator of ours; that of a whole model names the key itself
        return f"{name}: {problem['ctx']['error']}" if loc else f"{name}{problem['ctx']['error']}"
    expected = EXPECTED.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{name}: expected {expected}, found {reprlib.repr(problem['input'])}"
