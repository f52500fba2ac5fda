"""Anomaly scores and heat maps on disk: the output folder of `pipeline detect-anomaly`.

scores.json          one entry per image, `images`: as COCO has images, id, file_name, width and
                     height; and split, class, score, and heat_map: its file, low and high
heatmaps/<name>.png  16-bit grey, stretched over its image: a pixel p stands for the value
                     low + (high - low) * p / 65535

Scores and values are those of the method, the same scale for all images: higher is less like a
good image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.data.files import atomic_path, decode, read_json, write_json
from pipeline.errors import UserError

SCORES = "scores.json"
FOLDER = "heatmaps"
LEVELS = 2**16 - 1
_KEYS = {"id", "file_name", "width", "height", "split", "class", "score", "heat_map"}
_HEAT_MAP_KEYS = {"file", "low", "high"}


@dataclass(frozen=True)
class Scored:
    """An image's score, and where its heat map is."""

    image_id: int
    file_name: str
    width: int
    height: int
    split: str
    cls: str
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


def _is_entry(value: object) -> bool:
    if not (isinstance(value, dict) and value.keys() >= _KEYS):
        return False
    return isinstance(value["heat_map"], dict) and value["heat_map"].keys() >= _HEAT_MAP_KEYS
