"""The panels of a picture: which are seen when, and what each shows.

Heat maps have a panel of their own, on one scale for all images: under boxes and masks they would
be hidden where it matters, and over them they would hide these.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import supervision as sv

from pipeline.config import OverlayConfig
from pipeline.data import heatmaps
from pipeline.data.overlay.predicted import Predictions
from pipeline.data.overlay.reel import ANNOTATED, Reel, Shot, kind_of, truth_of
from pipeline.errors import UserError

BLINK = 0.5  # seconds of truth, and of prediction: under the three flashes a second of WCAG 2.3.1
WIDEST_PANEL = 2.0  # width / height; an image longer or taller than this gets bars
HEAT_MAP = "heat map"  # caption of its panel

Panel = tuple[sv.Detections, Sequence[str]]  # instances of an image, and a label for each


class HeatMaps:
    """The heat maps of the images. Raises `UserError` if there are none.

    `folds` is the number of folds of a video of all of them, whose `path` has `{fold}` in it.
    """

    def __init__(self, path: Path, fold: int | Literal["all"] | None, folds: int) -> None:
        self._path = path
        self._found = heatmaps.read_by_id(path, fold, folds)
        self._limits = heatmaps.scale(list(self._found.values()))

    def of(self, shot: Shot) -> heatmaps.Scored:
        """That of an image. Raises `UserError` if there is none, or of another image."""
        found = self._found.get(shot.image_id)
        if found is None:
            raise UserError(
                f"--heat-maps: expected that of {shot.name} in {self._path}, found none"
            )
        size = found.width, found.height  # of an image without truth it shows when it is read
        if shot.sample is not None:
            size = shot.sample.width, shot.sample.height
        found.check("--heat-maps", shot.name, *size)
        return found

    def over(self, shot: Shot, image: np.ndarray) -> np.ndarray:
        """The image under its heat map. Raises `UserError` if that is of another image."""
        scored = self.of(shot)
        scored.check("--heat-maps", shot.name, image.shape[1], image.shape[0])
        return heatmaps.blended(image, scored, self._limits)


def views(config: OverlayConfig, has_predictions: bool) -> list[tuple[str, ...]]:
    """The captions of the panels that are seen together; views take turns.

    A heat map is beside whatever else is seen.
    """
    heat = (HEAT_MAP,) if config.heat_maps else ()
    known = ("truth",) * (kind_of(config.source) in ANNOTATED) + ("prediction",) * has_predictions
    if config.layout == "side-by-side":
        return [known + heat]
    if config.layout == "blink":
        turns = known if len(known) == 2 else ("image", *known)
        return [(caption, *heat) for caption in turns]
    return [(config.layout, *heat)]


def parts(
    config: OverlayConfig, views: int, reel: Reel, time: int, stays: int
) -> list[tuple[int, int]]:
    """Which view a picture has for how many frames, from frame `time` on for `stays` frames."""
    if stays == 0:
        return []
    if views == 1:
        return [(0, stays)]
    if reel.shots is None:  # a video goes on while its views take turns
        return [(int(time / reel.fps / BLINK) % views, stays)]
    turns = views * max(1, min(round(stays / reel.fps / BLINK), stays) // views)
    if not config.out.suffix:  # numbered pictures: one of each
        turns = views
    ends = [round(turn * stays / turns) for turn in range(turns + 1)]
    return [(turn % views, ends[turn + 1] - ends[turn]) for turn in range(turns)]


def by_caption(
    shot: Shot, image: np.ndarray, classes: tuple[str, ...], predictions: Predictions | None
) -> dict[str, Panel]:
    """What a panel of each caption shows."""
    instances = {"image": sv.Detections.empty(), HEAT_MAP: sv.Detections.empty()}
    if shot.sample is not None:
        instances["truth"] = truth_of(shot.sample)
    if predictions is not None:
        size = image.shape[1], image.shape[0]
        instances["prediction"] = predictions.of(shot.name, shot.image_id, size)
    return {caption: (found, _labels(found, classes)) for caption, found in instances.items()}


def _labels(instances: sv.Detections, classes: tuple[str, ...]) -> list[str]:
    """'class', for predictions 'class score', and 'q' with the mask's quality if it is known."""
    labels = []
    for i in range(len(instances)):
        assert instances.class_id is not None
        label = classes[instances.class_id[i]]
        if instances.confidence is not None:
            label += f" {instances.confidence[i]:.2f}"
        if "quality" in instances.data and np.isfinite(instances.data["quality"][i]):
            label += f" q {instances.data['quality'][i]:.2f}"
        labels.append(label)
    return labels


def size(sizes: list[tuple[int, int]], height: int) -> tuple[int, int]:
    """(width, height) of a panel with the images' median aspect."""
    aspect = statistics.median(w / h for w, h in sizes)
    return round(height * min(max(aspect, 1 / WIDEST_PANEL), WIDEST_PANEL)), height
