"""Truth on disk: COCO instances, YOLO labels and the lists Ultralytics trains from.

Both formats derive from one half-open pixel box. COCO: https://cocodataset.org/#format-data
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from pipeline.data.dataset import Sample, coco_instances, split_name
from pipeline.data.files import write_json, write_text
from pipeline.data.masks import box_of, decode_rle, encode_rle
from pipeline.data.splits import Split
from pipeline.errors import UserError

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Instance:
    """One defect of an image."""

    cls: str
    box: Box  # half-open pixels: x1, y1, x2, y2
    area: int  # pixels of the mask
    rle: dict[str, Any]
    score: float | None = None  # of a prediction


@dataclass(frozen=True)
class Item:
    """One image and its instances."""

    file_name: str
    width: int
    height: int
    instances: tuple[Instance, ...]


def instance_of(cls: str, mask: np.ndarray, score: float | None = None) -> Instance:
    """The instance of a (height, width) bool mask. Raises `ValueError` if it has no pixels."""
    return Instance(cls, box_of(mask), int(np.count_nonzero(mask)), encode_rle(mask), score)


def yolo_label(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Centre x, centre y, width and height of a pixel box, as parts of the image's sides."""
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height


def write_truth(folder: Path, items: Sequence[Item], classes: Sequence[str]) -> dict[str, Any]:
    """Write a YOLO label file per image and `annotations/instances.json`; returns the latter.

    Ids of images and annotations start at 1, in the order of `items`.
    """
    for item in items:
        text = ""
        for instance in item.instances:
            label = yolo_label(instance.box, item.width, item.height)
            values = " ".join(f"{value:.9f}" for value in label)
            text += f"{classes.index(instance.cls)} {values}\n"
        write_text(folder / "labels" / (Path(item.file_name).stem + ".txt"), text)
    coco = instances_json(items, classes)
    write_json(folder / "annotations" / "instances.json", coco)
    return coco


def write_split(
    folder: Path, coco: dict[str, Any], split: Split, root: Path, fold: int | None = None
) -> None:
    """Write a split's lists, its COCO files and the YAML file Ultralytics reads it from.

    `root` is where the dataset will lie: Ultralytics would look for a relative path elsewhere.
    """
    for part, names in split.items():
        stem = split_name(part, fold)
        write_text(folder / f"{stem}.txt", "".join(f"./images/{name}\n" for name in names))
        write_json(folder / "annotations" / f"instances_{stem}.json", _subset(coco, names))
    data = {
        "path": str(root),
        **{part: f"{split_name(part, fold)}.txt" for part in ("train", "val", "test")},
        "names": {c["id"] - 1: c["name"] for c in coco["categories"]},
    }
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    write_text(folder / ("data.yaml" if fold is None else f"fold{fold}.yaml"), text)


def instances_json(items: Iterable[Item], classes: Sequence[str]) -> dict[str, Any]:
    """COCO instances. Ids are from 1: of images and annotations in the order of `items`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, item in enumerate(items, start=1):
        size = {"width": item.width, "height": item.height}
        images.append({"id": image_id, "file_name": item.file_name, **size})
        for instance in item.instances:
            x1, y1, x2, y2 = instance.box
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": classes.index(instance.cls) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": instance.area,
                "segmentation": instance.rle,
                "iscrowd": 0,
            }
            if instance.score is not None:
                annotation["score"] = instance.score
            annotations.append(annotation)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _subset(coco: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The images of these names with their annotations; ids stay as they are."""
    wanted = set(names)
    images = [image for image in coco["images"] if image["file_name"] in wanted]
    ids = {image["id"] for image in images}
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": coco["categories"]}


def read_coco(path: Path, images: Path | None = None) -> tuple[tuple[str, ...], list[Sample]]:
    """The classes and images of any COCO instances file, with ids from 1 in the file's order.

    Masks may be polygons or run lengths, compressed or not, and may be missing. Crowds are left
    out. The images are looked for in the folder `images`; without it, beside the file, in its
    parent, or in a folder named images in either. Raises `UserError` when the file is not COCO's,
    has no images, or where they are not found.
    """
    with coco_instances(path) as coco:
        if not coco["images"]:
            raise UserError(f"{path}: expected images, found none")
        return _classes_and_samples(path, coco, images)


def read_instances(path: Path) -> list[Item]:
    """The images and masks of any COCO instances file, whose images need not be there.

    Masks may be of any kind, and those without pixels are left out. Crowds count like all others,
    since datumaro and CVAT call every mask of run lengths one. Raises `UserError` when the file is
    not COCO's, and for an annotation without a mask.
    """
    with coco_instances(path) as coco:
        names = {category["id"]: str(category["name"]) for category in coco["categories"]}
        found: dict[int, list[Instance]] = {image["id"]: [] for image in coco["images"]}
        sizes = {
            image["id"]: (int(image["height"]), int(image["width"])) for image in coco["images"]
        }
        for annotation in coco["annotations"]:
            if not annotation.get("segmentation"):
                raise UserError(
                    f"{path}: annotation {annotation.get('id')}: expected a mask, found none"
                )
            image_id = annotation["image_id"]
            rle = run_lengths(annotation["segmentation"], *sizes[image_id])
            mask = decode_rle(rle)
            if mask.any():
                cls = names[annotation["category_id"]]
                found[image_id].append(instance_of(cls, mask))
        return [
            Item(
                Path(image["file_name"]).name, *sizes[image["id"]][::-1], tuple(found[image["id"]])
            )
            for image in coco["images"]
        ]


def _classes_and_samples(
    path: Path, coco: dict[str, Any], images: Path | None
) -> tuple[tuple[str, ...], list[Sample]]:
    categories = {category["id"]: i for i, category in enumerate(coco["categories"], start=1)}
    sizes = {image["id"]: (int(image["height"]), int(image["width"])) for image in coco["images"]}
    annotations: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in sizes}
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd"):
            image_id = annotation["image_id"]
            x, y, width, height = (float(v) for v in annotation["bbox"])
            entry: dict[str, Any] = {
                "image_id": image_id,
                "category_id": categories[annotation["category_id"]],
                "bbox": [x, y, width, height],
                "area": width * height,
            }
            if annotation.get("segmentation"):
                rle = run_lengths(annotation["segmentation"], *sizes[image_id])
                entry |= {"segmentation": rle, "area": int(coco_mask.area(rle))}
            annotations[image_id].append(entry)
    folder = images or _image_folder(path, coco["images"][0]["file_name"])
    samples = [
        Sample(
            image["id"],
            folder / image["file_name"],
            image["width"],
            image["height"],
            tuple(annotations[image["id"]]),
        )
        for image in coco["images"]
    ]
    if missing := [sample.path for sample in samples if not sample.path.is_file()]:
        raise UserError(
            f"{path}: expected its images in {folder}, found no {missing[0].name} there"
            + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
        )
    return tuple(str(category["name"]) for category in coco["categories"]), samples


def _image_folder(path: Path, name: str) -> Path:
    """The folder near a COCO file that has the image of this name, or the file's own."""
    near = [path.parent, path.parent / "images", path.parent.parent, path.parent.parent / "images"]
    return next((folder for folder in near if (folder / name).is_file()), path.parent)


def run_lengths(shape: Any, height: int, width: int) -> dict[str, Any]:
    """Compressed run lengths of polygons or of run lengths of any kind."""
    if isinstance(shape, list):
        if any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
            raise ValueError("a polygon of fewer than three points")
        rle = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        rle = coco_mask.frPyObjects(shape, height, width)
    else:
        rle = shape
    if tuple(rle["size"]) != (height, width):
        raise ValueError(f"a mask of {rle['size']} in an image of {[height, width]}")
    return dict(rle)
