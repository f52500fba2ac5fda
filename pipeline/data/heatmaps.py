"""Anomaly scores and heat maps on disk: what `pipeline detect-anomaly` and `segment` write.

scores.json          one entry per image, `images`: as COCO has images, id, file_name, width and
                     height; and split, class (null where they are not known), score, and heat_map:
                     its file, low and high
heatmaps/<name>.png  16-bit grey, stretched over its image: a pixel p stands for the value
                     low + (high - low) * p / 65535

Scores and values are those of the method, the same scale for all images: higher is less like a
good image.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.config import of_fold
from pipeline.data.files import atomic_path, decode, read_json, write_json
from pipeline.errors import UserError

SCORES = "scores.json"
FOLDER = "heatmaps"
METRICS = "metrics.json"
LEVELS = 2**16 - 1
OPACITY = 0.6  # of a heat map over its image, as in the report page
_KEYS = {"id", "file_name", "width", "height", "split", "class", "score", "heat_map"}
_HEAT_MAP_KEYS = {"file", "low", "high"}


@dataclass(frozen=True)
class Scored:
    """An image's score, and where its heat map is."""

    image_id: int
    file_name: str
    width: int
    height: int
    split: str | None
    cls: str | None
    score: float
    path: Path
    low: float
    high: float

    def heat_map(self) -> np.ndarray:
        """(height, width) float32, in the image's size. Raises `UserError` if it is not there."""
        pixels = decode(self.path, cv2.IMREAD_UNCHANGED)
        if pixels.dtype != np.uint16 or pixels.ndim != 2:
            channels = 1 if pixels.ndim == 2 else pixels.shape[2]
            found = f"{pixels.dtype} with {channels} channels"
            raise UserError(f"{self.path}: expected 16-bit grey, found {found}")
        values = self.low + (self.high - self.low) / LEVELS * pixels.astype(np.float32)
        size = (self.width, self.height)
        return np.asarray(cv2.resize(values.astype(np.float32), size)).astype(np.float32)

    def check(self, flag: str, file_name: str, width: int, height: int) -> None:
        """Raise `UserError` unless it is of the image that has its id."""
        if (self.file_name, self.width, self.height) != (file_name, width, height):
            raise UserError(
                f"{flag}: image {self.image_id}: expected {file_name} with {width}x{height} "
                f"pixels, found {self.file_name} with {self.width}x{self.height}"
            )


def write_heat_map(folder: Path, file_name: str, values: np.ndarray) -> dict[str, Any]:
    """Write the map (h, w) of the image of this name; returns the `heat_map` of its entry."""
    low, high = float(values.min()), float(values.max())
    pixels = np.rint((values - low) / ((high - low) or 1) * LEVELS).astype(np.uint16)
    # Only .png goes: the maps of a.jpg and a.png must not overwrite one another.
    name = f"{FOLDER}/{file_name.removesuffix('.png')}.png"
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return {"file": name, "low": low, "high": high}


def write_scores(folder: Path, images: list[dict[str, Any]]) -> None:
    """Write scores.json, last: a folder that has it has all heat maps."""
    write_json(folder / SCORES, {"images": images})


def read_scores(folder: Path) -> list[Scored]:
    """The entries of scores.json. Raises `UserError` when it is not one."""
    path = folder / SCORES
    content = read_json(path)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise UserError(f"{path}: expected scores of `pipeline detect-anomaly`, found other JSON")
    return [
        Scored(
            image_id=entry["id"],
            file_name=entry["file_name"],
            width=entry["width"],
            height=entry["height"],
            split=entry["split"],
            cls=entry["class"],
            score=entry["score"],
            path=folder / entry["heat_map"]["file"],
            low=entry["heat_map"]["low"],
            high=entry["heat_map"]["high"],
        )
        for entry in entries
    ]


def read_by_id(folder: Path, folds: int | None = None) -> dict[int, Scored]:
    """The entries of scores.json by image id.

    Of all folds, `folds` in number and their paths with `{fold}`, each image's is that of the fold
    that tests it. Raises `UserError` when they are not scores.
    """
    if folds is None:
        return {its.image_id: its for its in read_scores(folder)}
    found: dict[int, Scored] = {}
    for k in range(folds):
        scored = read_scores(of_fold(folder, k))
        found |= {its.image_id: its for its in scored if its.split == "test"}
    return found


def read_metrics(folder: Path) -> dict[str, Any]:
    """The figures of `pipeline detect-anomaly`. Raises `UserError` when they are not there."""
    path = folder / METRICS
    content = read_json(path)
    known = isinstance(content, dict) and content.keys() >= {"protocol", "fold", "image"}
    if not known or not isinstance(content["image"], dict):
        raise UserError(f"{path}: expected figures of `pipeline detect-anomaly`, found other JSON")
    return content


def read_threshold(folder: Path) -> float:
    """The score with the best F1 on val. Raises `UserError` where there was none to choose."""
    threshold = read_metrics(folder)["image"].get("threshold")
    if threshold is None:
        raise UserError(
            f"--anomaly: expected a threshold in {folder / METRICS}, found none, for there was no "
            "val split with defects to choose it on; give one (--anomaly-threshold)"
        )
    if not isinstance(threshold, int | float):
        raise UserError(f"{folder / METRICS}: expected a number as threshold, found {threshold!r}")
    return float(threshold)


def _is_entry(value: object) -> bool:
    if not (isinstance(value, dict) and value.keys() >= _KEYS):
        return False
    if not isinstance(value["score"], int | float):
        return False
    return isinstance(value["heat_map"], dict) and value["heat_map"].keys() >= _HEAT_MAP_KEYS


# ---- Pictures ---------------------------------------------------------------------------------


def scale(scored: Collection[Scored]) -> tuple[float, float]:
    """The values that are black and white in all heat maps, so that they can be compared."""
    if not scored:
        return 0.0, 1.0
    low = float(np.median([its.low for its in scored]))
    high = max(its.high for its in scored)
    return low, high if high > low else low + 1


def coloured(scored: Scored, limits: tuple[float, float]) -> np.ndarray:
    """The heat map in colours, (height, width, 3) uint8 BGR; `limits` are those of `scale`."""
    low, high = limits
    values = np.clip((scored.heat_map() - low) / (high - low), 0, 1)
    grey = np.rint(255 * values).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO))


def blended(image: np.ndarray, scored: Scored, limits: tuple[float, float]) -> np.ndarray:
    """The heat map over its image, (height, width, 3) uint8 BGR, whose size it has to have."""
    heat = coloured(scored, limits)
    return np.asarray(cv2.addWeighted(heat, OPACITY, image, 1 - OPACITY, 0))
