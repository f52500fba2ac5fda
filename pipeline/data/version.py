"""A dataset that a new version is made of: the same images, ids, splits and folds, other labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.coco import Instance, Item
from pipeline.data.dataset import GOOD, Dataset, Sample
from pipeline.data.dataset_folder import MANIFEST, Counts
from pipeline.data.files import read_json
from pipeline.data.splits import Split
from pipeline.errors import UserError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Version:
    """A dataset folder, read."""

    samples: list[Sample]  # with image ids from 1, in their order
    classes: tuple[str, ...]
    split: Split
    folds: list[Split]
    manifest: dict[str, Any]


def read_version(root: Path) -> Version:
    """The dataset that is corrected. Raises `UserError` for one that cannot be."""
    dataset = Dataset(root)
    samples = dataset.images()
    if [sample.image_id for sample in samples] != list(range(1, len(samples) + 1)):
        raise UserError(f"{root}: expected images with ids from 1 in their order, found others")
    for sample in samples:
        if any("segmentation" not in annotation for annotation in sample.annotations):
            raise UserError(f"{root}: expected a mask of each label, found none in {sample.path}")
    manifest = read_json(root / MANIFEST)
    if not _is_manifest(manifest):
        raise UserError(f"{root / MANIFEST}: expected that of a dataset, found other JSON")
    folds = [names_in(dataset, fold) for fold in range(dataset.fold_count())]
    return Version(samples, dataset.classes, names_in(dataset), folds, manifest)


def _is_manifest(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if not all(isinstance(value.get(work, []), list) for work in ("reviews", "imports")):
        return False
    images = value.get("images")
    return isinstance(images, list) and all(isinstance(image, dict) for image in images)


def names_in(dataset: Dataset, fold: int | None = None) -> Split:
    """The file names of each part of the single split, or of a fold."""
    return {part: [sample.path.name for sample in dataset.split(part, fold)] for part in PARTS}


def item_of(sample: Sample, classes: Sequence[str]) -> Item:
    """An image with its labels, each of which has a mask."""
    instances = []
    for annotation in sample.annotations:
        x, y, width, height = annotation["bbox"]
        cls = classes[annotation["category_id"] - 1]
        box = (x, y, x + width, y + height)
        instances.append(Instance(cls, box, annotation["area"], annotation["segmentation"]))
    return Item(sample.path.name, sample.width, sample.height, tuple(instances))


def shown_class(item: Item) -> str:
    """The class of an image: that of its largest instance, or good."""
    return max(item.instances, key=lambda i: i.area).cls if item.instances else GOOD


def updated(
    manifest: Mapping[str, Any], items: Sequence[Item], split: Split, counts: Counts
) -> dict[str, Any]:
    """The manifest of the old version, which names each image, with the labels of the new one."""
    known = {image.get("file"): image for image in manifest["images"]}
    part_of = {name: part for part, names in split.items() for name in names}
    images = []
    for item in items:
        file = f"images/{item.file_name}"
        image = {**known.get(file, {"file": file})}
        image |= {"class": shown_class(item), "split": part_of[item.file_name]}
        if item.instances or "instances" in image:
            image["instances"] = len(item.instances)
        images.append(image)
    return {**manifest, "counts": counts, "images": images}
