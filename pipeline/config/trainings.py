"""Options of the trainings: finetune-yolo, finetune-sam, finetune-classifier, finetune-head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.base import (
    Cache,
    CacheSize,
    Folder,
    Fraction,
    LoggedConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    Zoom,
    listed,
)

# Options whose default differs from training to training.
Epochs = Annotated[PositiveInt, Field(description="most passes over the training images")]
Patience = Annotated[
    PositiveInt, Field(description="stop after this many epochs without improvement")
]
Batch = Annotated[PositiveInt, Field(description="images (or boxes) per step")]
LearningRate = Annotated[PositiveFloat, Field(description="peak learning rate")]


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


class FinetuneSamConfig(TrainConfig):
    """Fine-tune SAM's mask decoder on the boxes and masks of one or more datasets."""

    data: Annotated[tuple[Path, ...], BeforeValidator(listed)] = Field(  # type: ignore[assignment]
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
