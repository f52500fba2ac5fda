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
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field, NonNegativeFloat

from pipeline.config import SplitName, of_fold
from pipeline.data import stored
from pipeline.data.files import atomic_path, decode, write_json
from pipeline.data.stored import Image, Images, Stored
from pipeline.errors import UserError

SCORES = "scores.json"
FOLDER = "heatmaps"
METRICS = "metrics.json"
LEVELS = 2**16 - 1
OPACITY = 0.6  # of a heat map over its image, as in the report page


class _HeatMap(Stored):
    file: str
    low: float
    high: float


class _Entry(Image):
    split: SplitName | None
    cls: str | None = Field(alias="class")
    score: float
    heat_map: _HeatMap


class _Scores(Stored):
    images: Images[_Entry]


class _OfImages(Stored):
    threshold: float | None


class _Seconds(Stored):
    training: NonNegativeFloat
    inference_per_image: NonNegativeFloat


class Metrics(Stored):
    """What others read of the metrics.json of `pipeline detect-anomaly`."""

    method: str
    protocol: Literal["mvtec", "dataset"]
    fold: int | None
    image: _OfImages
    seconds: _Seconds


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
    what = "scores of `pipeline detect-anomaly`"
    return [
        Scored(
            image_id=entry.id,
            file_name=entry.file_name,
            width=entry.width,
            height=entry.height,
            split=entry.split,
            cls=entry.cls,
            score=entry.score,
            path=folder / entry.heat_map.file,
            low=entry.heat_map.low,
            high=entry.heat_map.high,
        )
        for entry in stored.read(folder / SCORES, _Scores, what).images
    ]


def read_by_id(
    folder: Path, fold: int | Literal["all"] | None, folds: int = 0
) -> dict[int, Scored]:
    """The entries of scores.json by image id.

    Of all folds, `folds` in number and their paths with `{fold}`, each image's is that of the fold
    that tests it. Raises `UserError` when they are not scores, or of another fold.
    """
    if fold != "all":
        stored.check_fold(folder, fold)
        return {its.image_id: its for its in read_scores(folder)}
    found: dict[int, Scored] = {}
    for k in range(folds):
        scored = read_by_id(of_fold(folder, k), k)
        found |= {key: its for key, its in scored.items() if its.split == "test"}
    return found


def read_metrics(folder: Path) -> Metrics:
    """The figures of `pipeline detect-anomaly`. Raises `UserError` when they are not there."""
    return stored.read(folder / METRICS, Metrics, "figures of `pipeline detect-anomaly`")


def check_dataset(folder: Path, fold: int | None) -> None:
    """Raise `UserError` unless a run of `pipeline detect-anomaly` is of a dataset and this fold."""
    made = read_metrics(folder)
    found = stored.fold_in_words(made.fold)
    if made.protocol != "dataset":
        found = "an MVTec category, which may have learned images of the dataset's splits"
    if made.protocol != "dataset" or made.fold != fold:
        expected = stored.fold_in_words(fold)
        raise UserError(f"--anomaly: expected a run of {expected}, found one of {found}: {folder}")


def read_threshold(folder: Path) -> float:
    """The score with the best F1 on val. Raises `UserError` where there was none to choose."""
    threshold = read_metrics(folder).image.threshold
    if threshold is None:
        raise UserError(
            f"--anomaly: expected a threshold in {folder / METRICS}, found none, for there was no "
            "val split with defects to choose it on; give one (--anomaly-threshold)"
        )
    return threshold


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
