"""A converted dataset as the stages read it: images, splits and truth.

Folder, as `pipeline convert` writes it:

    images/<class>__<name>        labels/<class>__<name>.txt      data.yaml  manifest.json
    train.txt val.txt test.txt    annotations/instances.json, instances_train.json, ...
    fold0_train.txt ...           annotations/instances_fold0_train.json ...  fold0.yaml
    hard_negatives.json           (of `pipeline apply-review`: COCO results that a person rejected)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv

from pipeline.data.files import read_image, read_json
from pipeline.data.masks import decode_rle
from pipeline.data.predictions import read_results
from pipeline.errors import UserError

GOOD = "good"  # the image class without defects, in MVTec's spelling
HARD_NEGATIVES = "hard_negatives.json"
ANNOTATION_KEYS = {"image_id", "category_id", "bbox", "area"}  # that every annotation has


def split_name(name: str, fold: int | None = None) -> str:
    """The stem of a split's files: `test`, or `fold2_test`."""
    return name if fold is None else f"fold{fold}_{name}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a dataset and its truth."""

    image_id: int
    path: Path
    width: int
    height: int
    annotations: tuple[dict[str, Any], ...]  # COCO annotations
    hard_negatives: tuple[dict[str, Any], ...] = ()  # COCO results that a person rejected

    def image(self) -> np.ndarray:
        """(height, width, 3) uint8 BGR."""
        return read_image(self.path)

    @cached_property
    def truth(self) -> sv.Detections:
        """True instances: half-open pixel boxes, class index from 0, (n, height, width) masks.

        Masks only if every annotation has one.
        """
        if not self.annotations:
            return sv.Detections.empty()
        xywh = np.array([a["bbox"] for a in self.annotations], np.float32)
        masks = [a["segmentation"] for a in self.annotations if "segmentation" in a]
        complete = len(masks) == len(self.annotations)
        return sv.Detections(
            xyxy=np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]),
            class_id=np.array([a["category_id"] - 1 for a in self.annotations]),
            mask=np.stack([decode_rle(rle) for rle in masks]) if complete else None,
        )

    def defect(self) -> np.ndarray:
        """(height, width) bool: the pixels of all true masks together."""
        if self.truth.mask is None:
            return np.zeros((self.height, self.width), bool)
        return np.asarray(np.asarray(self.truth.mask).any(axis=0))

    @property
    def label(self) -> int:
        """Class index of the image: its annotations' class (the largest one's), or -1 for good."""
        if not self.annotations:
            return -1
        return int(max(self.annotations, key=lambda a: a["area"])["category_id"]) - 1


def learned_classes(samples: Iterable[Sample], classes: Sequence[str]) -> tuple[str, ...]:
    """Those of a dataset's classes that have instances in these images, in their order."""
    found = {a["category_id"] for sample in samples for a in sample.annotations}
    return tuple(name for i, name in enumerate(classes, start=1) if i in found)


def of_classes(
    samples: Iterable[Sample], classes: Sequence[str], kept: Sequence[str]
) -> list[Sample]:
    """The images as a model sees them that knows the classes `kept` of a dataset's `classes`.

    Category ids are those of `kept`. An image with an instance of another class is left out: it is
    neither good nor fully labelled.
    """
    new = {classes.index(name) + 1: i for i, name in enumerate(kept, start=1)}
    return [
        replace(
            sample,
            annotations=_renumbered(sample.annotations, new),
            hard_negatives=_renumbered(
                [entry for entry in sample.hard_negatives if entry["category_id"] in new], new
            ),
        )
        for sample in samples
        if all(annotation["category_id"] in new for annotation in sample.annotations)
    ]


def _renumbered(
    entries: Iterable[dict[str, Any]], new: Mapping[int, int]
) -> tuple[dict[str, Any], ...]:
    return tuple({**entry, "category_id": new[entry["category_id"]]} for entry in entries)


class Dataset:
    """A folder written by `pipeline convert`. Raises `UserError` when it is not one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "annotations" / "instances.json").is_file():
            raise UserError(f"{root}: expected a folder written by `pipeline convert`, found none")
        with coco_instances(self._path("instances")) as coco:
            self.classes: tuple[str, ...] = tuple(
                category["name"] for category in coco["categories"]
            )

    def fold_count(self) -> int:
        """How many folds were written; 0: none."""
        return next(k for k in itertools.count() if not self.has_split("test", k))

    def folds(self) -> list[list[Sample]]:
        """The test images of each fold. Raises `UserError` unless every image is in exactly one."""
        count = self.fold_count()
        if not count:
            raise UserError(f"{self.root}: expected folds (`pipeline convert --folds`), found none")
        folds = [self.split("test", k) for k in range(count)]
        tested = sorted(sample.image_id for samples in folds for sample in samples)
        images = sorted(sample.image_id for sample in self.images())
        if tested != images:
            raise UserError(
                f"{self.root}: expected each of {len(images)} images to be tested in one fold, "
                f"found {len(tested)} test images, {len(set(tested))} of them different"
            )
        return folds

    def split(self, name: str, fold: int | Literal["all"] | None = None) -> list[Sample]:
        """The images of a split, in file order.

        Raises `UserError` when there is no such split, and for a damaged file. Of all folds there
        is but the test split: every image, fold by fold.
        """
        if fold == "all":
            assert name == "test"
            return [sample for samples in self.folds() for sample in samples]
        if not self.has_split(name, fold):
            path = self._split_path(name, fold)
            found = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("*_*.json"))
            raise UserError(f"{path}: expected this split, found {', '.join(found) or 'none'}")
        return self._samples(self._split_path(name, fold))

    def has_split(self, name: str, fold: int | None = None) -> bool:
        """Whether a split was written, be it without images."""
        return self._split_path(name, fold).is_file()

    def split_if_any(self, name: str, fold: int | None = None) -> list[Sample]:
        """The images of a split, none if there is no such split.

        Raises `UserError` for a damaged file.
        """
        return self.split(name, fold) if self.has_split(name, fold) else []

    def images(self) -> list[Sample]:
        """All images, in file order."""
        return self._samples(self._path("instances"))

    @cached_property
    def _hard_negatives(self) -> dict[int, list[dict[str, Any]]]:
        """By image id. Raises `UserError` for those of other classes."""
        path = self.root / HARD_NEGATIVES
        found = read_results(path) if path.is_file() else {}
        largest = max((e["category_id"] for entries in found.values() for e in entries), default=0)
        if largest > len(self.classes):
            raise UserError(
                f"{path}: expected category ids up to {len(self.classes)}, found {largest}"
            )
        return found

    def _path(self, stem: str) -> Path:
        return self.root / "annotations" / f"{stem}.json"

    def _split_path(self, name: str, fold: int | None) -> Path:
        return self._path(f"instances_{split_name(name, fold)}")

    def _samples(self, path: Path) -> list[Sample]:
        hard_negatives = self._hard_negatives
        with coco_instances(path) as coco:
            annotations: dict[int, list[dict[str, Any]]] = {
                image["id"]: [] for image in coco["images"]
            }
            for annotation in coco["annotations"]:
                if missing := ANNOTATION_KEYS - annotation.keys():
                    raise KeyError(min(missing))
                annotations[annotation["image_id"]].append(annotation)
            return [
                Sample(
                    image["id"],
                    self.root / "images" / image["file_name"],
                    image["width"],
                    image["height"],
                    tuple(annotations[image["id"]]),
                    tuple(hard_negatives.get(image["id"], ())),
                )
                for image in coco["images"]
            ]


@contextmanager
def coco_instances(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a COCO instances file. Whatever is wrong in it becomes a `UserError`."""
    coco = read_json(path)
    if not isinstance(coco, dict) or not {"images", "annotations", "categories"} <= coco.keys():
        raise UserError(f"{path}: expected COCO instances, found other JSON")
    try:
        yield coco
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: expected COCO instances, found other entries ({found})") from None
