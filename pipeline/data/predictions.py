"""Predictions on disk: the output folder of `pipeline segment`.

predictions.json   COCO results: one entry per instance, with its score and mask
images.json        COCO images and categories that the entries' ids refer to
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv

from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle, encode_rle
from pipeline.errors import UserError

PREDICTIONS = "predictions.json"
IMAGES = "images.json"


def coco_results(image_id: int, detections: sv.Detections) -> list[dict[str, Any]]:
    """Detections of one image as COCO results: bbox (x, y, width, height), RLE of any masks."""
    assert detections.class_id is not None and detections.confidence is not None
    results = []
    for i in range(len(detections)):
        x1, y1, x2, y2 = (round(float(v), 2) for v in detections.xyxy[i])
        entry: dict[str, Any] = {
            "image_id": image_id,
            "category_id": int(detections.class_id[i]) + 1,
            "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            "score": round(float(detections.confidence[i]), 5),
        }
        if detections.mask is not None:
            entry["segmentation"] = encode_rle(np.asarray(detections.mask[i]))
        if "quality" in detections.data:  # SAM's own estimate of the mask's IoU
            entry["quality"] = round(float(detections.data["quality"][i]), 4)
        results.append(entry)
    return results


def from_coco_results(entries: Sequence[Mapping[str, Any]]) -> sv.Detections:
    """The inverse of `coco_results`, for one image's entries; masks only if every entry has one."""
    if not entries:
        return sv.Detections.empty()
    xywh = np.array([entry["bbox"] for entry in entries], np.float32)
    masks = [entry.get("segmentation") for entry in entries]
    return sv.Detections(
        xyxy=np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]),
        class_id=np.array([entry["category_id"] - 1 for entry in entries]),
        confidence=np.array([entry["score"] for entry in entries], np.float32),
        mask=np.stack([decode_rle(rle) for rle in masks if rle]) if all(masks) else None,
        data={"quality": np.array([entry.get("quality", np.nan) for entry in entries], np.float32)},
    )


def write_predictions(
    folder: Path,
    results: list[dict[str, Any]],
    images: list[dict[str, Any]],
    classes: Iterable[str],
) -> None:
    """Write both files. `images` are COCO images: id, file_name, width, height."""
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    write_json(folder / IMAGES, {"images": images, "categories": categories, "annotations": []})
    write_json(folder / PREDICTIONS, results)


def read_images(folder: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Classes and COCO images of `write_predictions`. Raises `UserError` when there are none."""
    coco = read_json(folder / IMAGES)
    if not isinstance(coco, dict) or not {"images", "categories"} <= coco.keys():
        raise UserError(f"{folder / IMAGES}: expected COCO images and categories, found other JSON")
    return tuple(category["name"] for category in coco["categories"]), coco["images"]


def read_results(path: Path) -> dict[int, list[dict[str, Any]]]:
    """A COCO results file, grouped by image id. Raises `UserError` when it is not one."""
    entries = read_json(path)
    required = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of COCO results, found {type(entries).__name__}")
    grouped: dict[int, list[dict[str, Any]]] = {}
    for i, entry in enumerate(entries):
        missing = required - entry.keys() if isinstance(entry, dict) else required
        if missing:
            raise UserError(f"{path}: entry {i}: expected {', '.join(sorted(missing))}, found none")
        for key, (holds, expected) in _VALUES.items():
            if not holds(entry[key]):
                found = f"found {entry[key]!r}"
                raise UserError(f"{path}: entry {i}: {key}: expected {expected}, {found}")
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_box(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))):
        return False
    return min(value[2:]) >= 0


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_id": (lambda value: isinstance(value, int), "a whole number"),
    "category_id": (lambda value: isinstance(value, int) and value > 0, "a whole number above 0"),
    "bbox": (_is_box, "x, y, width and height in pixels"),
    "score": (_is_number, "a number"),
}
