"""Predictions on disk: the output folder of `pipeline segment`.

predictions.json   COCO results: one entry per instance, with its score and mask
images.json        COCO images and categories that the entries' ids refer to; where an anomaly
                   detector has looked at an image, it has `anomaly`: `score`, and the `threshold`
                   from which it is anomalous

Entries that `pipeline segment` reads may also have `points`, a list of [x, y, label] in image
pixels: SAM's label, 1 for foreground and 0 for background.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import supervision as sv
from pydantic import AfterValidator

from pipeline.config.base import Fraction
from pipeline.data import quality, stored
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle, encode_rle, is_rle
from pipeline.data.stored import Image, Images, Stored
from pipeline.errors import UserError

if TYPE_CHECKING:  # which itself reads results
    from pipeline.data.dataset import Sample

PREDICTIONS = "predictions.json"
IMAGES = "images.json"


class _Anomaly(Stored):
    score: float
    threshold: float


class _Seen(Image):
    threshold: Fraction = 0
    anomaly: _Anomaly | None = None


class _Category(Stored):
    id: int
    name: str


def _check_categories(categories: list[_Category]) -> list[_Category]:
    found = [category.id for category in categories]
    if found != list(range(1, len(found) + 1)):
        raise ValueError(f"expected ids from 1 on, in their order, found {found}")
    return categories


class _SeenImages(Stored):
    images: Images[_Seen]
    categories: Annotated[list[_Category], AfterValidator(_check_categories)]


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
    path = folder / IMAGES
    coco = read_json(path)
    stored.check(path, coco, _SeenImages, "COCO images and categories")
    return tuple(category["name"] for category in coco["categories"]), coco["images"]


def read_results(path: Path, prompt: str = "boxes") -> dict[int, list[dict[str, Any]]]:
    """A COCO results file, grouped by image id. Raises `UserError` when it is not one.

    With `masks` in the prompt, entries without a mask are an error, and with `points` those with
    malformed points; `check_prompts` compares both with the image.
    """
    entries = read_json(path)
    required = {"image_id", "category_id", "bbox", "score"}
    required |= {"segmentation"} if "masks" in prompt else set()
    checked = required | ({"points"} if "points" in prompt else set())
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of COCO results, found {type(entries).__name__}")
    grouped: dict[int, list[dict[str, Any]]] = {}
    for i, entry in enumerate(entries):
        missing = required - entry.keys() if isinstance(entry, dict) else required
        if missing:
            raise UserError(f"{path}: entry {i}: expected {', '.join(sorted(missing))}, found none")
        for key, (holds, expected) in _VALUES.items():
            if key in checked and key in entry and not holds(entry[key]):
                found = f"found {reprlib.repr(entry[key])}"
                raise UserError(f"{path}: entry {i}: {key}: expected {expected}, {found}")
        grouped.setdefault(entry["image_id"], []).append(entry)
    return grouped


def check_masks(
    folder: Path,
    classes: Sequence[str],
    images: Sequence[Mapping[str, Any]],
    results: Mapping[int, Sequence[Mapping[str, Any]]],
) -> None:
    """Raises `UserError` for predictions without masks, or that do not fit their images."""
    path = folder / PREDICTIONS
    entries = [entry for group in results.values() for entry in group]
    if bare := sum(not entry.get("segmentation") for entry in entries):
        raise UserError(
            f"{path}: expected a mask in each of {len(entries)} entries, found {bare} without"
        )
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    if strange := sorted(results.keys() - sizes.keys()):
        raise UserError(
            f"{path}: expected images of {folder / IMAGES}, found the id {strange[0]}, not there"
        )
    for entry in entries:
        where = f"{path}: image {entry['image_id']}"
        if entry["category_id"] > len(classes):
            raise UserError(
                f"{where}: expected a category of 1 to {len(classes)}, found {entry['category_id']}"
            )
        height, width = sizes[entry["image_id"]]
        if not is_rle(entry["segmentation"], (height, width)):
            raise UserError(
                f"{where}: expected a mask as compressed run lengths, of {height} rows and "
                f"{width} columns, found {reprlib.repr(entry['segmentation'])}"
            )


def mismatches(
    path: Path, images: Iterable[Mapping[str, Any]], samples: Iterable[Sample]
) -> list[str]:
    """A problem for each sample that is not as the COCO images of the file at `path` have it."""
    known = {
        image["id"]: (Path(image["file_name"]).name, image["width"], image["height"])
        for image in images
    }
    problems = []
    for sample in samples:
        expected = (sample.path.name, sample.width, sample.height)
        image = known.get(sample.image_id)
        if image != expected:
            name, width, height = expected
            other = "none" if image is None else "{} with {}x{}".format(*image)
            problems.append(
                f"{path}: image {sample.image_id}: "
                f"expected {name} with {width}x{height} pixels, found {other}"
            )
    return problems


def check_prompts(
    path: Path, entries: Iterable[Mapping[str, Any]], prompt: str, shape: tuple[int, int]
) -> None:
    """Raise `UserError` if what the prompt shows of a (height, width) image does not fit it.

    `entries` are those that `read_results` found for the image, with the same `prompt`.
    """
    height, width = shape
    for entry in entries:
        where = f"{path}: image {entry['image_id']}, bbox {entry['bbox']}"
        if "masks" in prompt and not is_rle(entry["segmentation"], shape):
            found = reprlib.repr(entry["segmentation"])
            raise UserError(
                f"{where}: segmentation: expected run lengths of a mask of {height} rows and "
                f"{width} columns, found {found}"
            )
        for x, y, label in entry.get("points", ()) if "points" in prompt else ():
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"{where}: points: expected points in an image of {width} x {height} pixels, "
                    f"found {[x, y, label]}"
                )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_box(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))):
        return False
    return min(value[2:]) >= 0


def _is_rle(value: object) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("size"), list)):
        return False
    return isinstance(value.get("counts"), str)


def _is_points(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_point, value))


def _is_point(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
        return False
    return value[2] in (0, 1)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_id": (lambda value: type(value) is int, "a whole number"),
    "category_id": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "bbox": (_is_box, "x, y, width and height in pixels"),
    "score": (_is_fraction, "a number of 0 to 1"),
    "segmentation": (_is_rle, "COCO's compressed run lengths, size and counts"),
    "points": (_is_points, "a list of [x, y, label] with label 1 (foreground) or 0 (background)"),
}


# ---- Checked against a dataset ----------------------------------------------------------------


@dataclass(frozen=True)
class Anomaly:
    """What an anomaly detector says of an image: anomalous from the threshold on."""

    score: float
    threshold: float


@dataclass(frozen=True)
class Predictions:
    """A predictions folder, checked against the dataset."""

    images: frozenset[int]  # ids of the images that were looked at
    results: dict[int, list[dict[str, Any]]]  # COCO results by image id
    anomaly: Mapping[int, Anomaly] = field(default_factory=dict)  # by image id, where it is known

    def of(self, sample: Sample, threshold: float = 0.0, masks: bool = True) -> sv.Detections:
        """An image's predictions from a score on."""
        kept = [e for e in self.results.get(sample.image_id, ()) if e["score"] >= threshold]
        if not masks:  # which take time and memory to decode
            kept = [{k: v for k, v in e.items() if k != "segmentation"} for e in kept]
        return from_coco_results(kept)

    def judge(
        self, samples: Sequence[Sample], thresholds: Sequence[float]
    ) -> quality.Judged | None:
        """The masks from each image's score on, held against the truth; None without quality."""
        entries = [entry for s in samples for entry in self.results.get(s.image_id, ())]
        if not entries or any("segmentation" not in e or e.get("quality") is None for e in entries):
            return None
        cut = zip(samples, thresholds, strict=True)
        return quality.judge((sample.truth, self.of(sample, score)) for sample, score in cut)


def read_predictions(
    folder: Path, classes: Sequence[str], samples: Sequence[Sample], val: Sequence[Sample] = ()
) -> Predictions:
    """Read a folder of `pipeline segment`. Raises `UserError` when it is not of these images.

    It may lack images of `val`.
    """
    found, images = read_images(folder)
    if found != tuple(classes):
        raise UserError(
            f"{folder / IMAGES}: expected the classes {list(classes)}, found {list(found)}"
        )
    known = {image["id"] for image in images}
    by_id = {s.image_id: s for s in val if s.image_id in known} | {s.image_id: s for s in samples}
    problems = mismatches(folder / IMAGES, images, by_id.values())
    results = read_results(folder / PREDICTIONS)
    wanted = list(by_id.values())
    problems += _check_entries(folder / PREDICTIONS, results, len(classes), wanted)
    anomalies = {image["id"]: image["anomaly"] for image in images if image.get("anomaly")}
    if problems:
        raise UserError(*problems)
    return Predictions(
        frozenset(known), results, {key: Anomaly(**value) for key, value in anomalies.items()}
    )


def _check_entries(
    path: Path, results: dict[int, list[dict[str, Any]]], classes: int, samples: Sequence[Sample]
) -> list[str]:
    """Problems of the results of these images, one line each."""
    problems = []
    with_masks = with_quality = 0
    entries = [(sample, entry) for sample in samples for entry in results.get(sample.image_id, ())]
    for sample, entry in entries:
        where = f"{path}: image {sample.image_id}"
        if entry["category_id"] not in range(1, classes + 1):
            problems.append(
                f"{where}: expected a category of 1 to {classes}, found {entry['category_id']}"
            )
        if "segmentation" in entry:
            with_masks += 1
            mask, size = entry["segmentation"], [sample.height, sample.width]
            if not _is_rle(mask) or mask["size"] != size:
                found = mask["size"] if _is_rle(mask) else mask
                problems.append(
                    f"{where}: expected a mask as run lengths, of {sample.height} rows and "
                    f"{sample.width} columns, found {reprlib.repr(found)}"
                )
        if (value := entry.get("quality")) is not None:
            with_quality += 1
            if not _is_fraction(value):
                problems.append(f"{where}: expected a quality of 0 to 1, found {value!r}")
    for name, count in (("masks", with_masks), ("quality", with_quality)):
        if count not in (0, len(entries)):
            problems.append(
                f"{path}: expected {name} in all {len(entries)} entries or in none, found {count}"
            )
    return problems
