"""Images for detectors that learn from good images alone, from either kind of folder.

An MVTec category has its own protocol: train/good is learned, test is measured, and there is no
validation split. Of a converted dataset the good images of the train split are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.data import mvtec
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.masks import box_of, encode_rle
from pipeline.errors import UserError

MIN_GOOD = 2  # images: fewer have no spread


@dataclass(frozen=True)
class Picture:
    """An image that is scored."""

    sample: Sample
    name: str  # unique, with suffix
    split: Literal["val", "test"]


@dataclass(frozen=True)
class OneClass:
    """What is learned and what is scored, the latter in the order val, test."""

    protocol: Literal["mvtec", "dataset"]
    classes: tuple[str, ...]  # of defects
    good: Sequence[Path]
    pictures: Sequence[Picture]

    def class_of(self, sample: Sample) -> str:
        return self.classes[sample.label] if sample.label >= 0 else GOOD


def read(source: Path, fold: int | None) -> OneClass:
    """What `source`, an MVTec category or a dataset folder, holds. Raises `UserError`."""
    is_dataset = (source / "annotations").is_dir()
    if not is_dataset and fold is not None:
        raise UserError(f"--fold: expected a dataset folder as --source, found {source}")
    found = _of_dataset(Dataset(source), fold) if is_dataset else _of_category(source)
    if len(found.good) < MIN_GOOD:
        raise UserError(
            f"--source: expected at least {MIN_GOOD} good images to learn from in {source}, "
            f"found {len(found.good)}"
        )
    if not any(picture.split == "test" for picture in found.pictures):
        raise UserError(f"--source: expected test images in {source}, found none")
    return found


def _of_dataset(dataset: Dataset, fold: int | None) -> OneClass:
    good = [sample.path for sample in dataset.split("train", fold) if sample.label < 0]
    splits: tuple[Literal["val", "test"], ...] = ("val", "test")
    pictures = [
        Picture(sample, sample.path.name, split)
        for split in splits
        for sample in dataset.split(split, fold)
    ]
    return OneClass("dataset", dataset.classes, good, pictures)


def _of_category(source: Path) -> OneClass:
    """Ids and names are those that `pipeline convert` would give, if it leaves nothing out."""
    categories = mvtec.categories(source)
    if categories != [source]:
        raise UserError(
            f"--source: expected one MVTec category, found a folder of them in {source}: "
            f"{', '.join(category.name for category in categories)}"
        )
    scan = mvtec.scan(source)
    if scan.problems:
        raise UserError(*map(str, scan.problems))
    classes = tuple(sorted({entry.cls for entry in scan.entries} - {GOOD}))
    problems, pictures, good = [], [], []
    for image_id, entry in enumerate(scan.entries, start=1):
        try:
            sample = _sample(image_id, entry, classes)
        except mvtec.BadFiles as bad:
            problems += bad.problems
            continue
        if entry.image.parent.parent.name == "test":
            pictures.append(Picture(sample, entry.name + entry.image.suffix, "test"))
        else:
            good.append(entry.image)
    if problems:
        raise UserError(*map(str, problems))
    return OneClass("mvtec", classes, good, pictures)


def _sample(image_id: int, entry: mvtec.Entry, classes: Sequence[str]) -> Sample:
    """An image and its truth, in which its mask is one instance. Raises `BadFiles`."""
    picture = mvtec.read(entry)
    if picture.mask is None:
        return Sample(image_id, entry.image, picture.width, picture.height, ())
    x1, y1, x2, y2 = box_of(picture.mask)
    annotation = {
        "image_id": image_id,
        "category_id": classes.index(entry.cls) + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(picture.mask.sum()),
        "segmentation": encode_rle(picture.mask),
    }
    return Sample(image_id, entry.image, picture.width, picture.height, (annotation,))
