"""Mask quality: how well SAM's own estimate of a mask's IoU can be trusted.

SAM's decoder predicts, beside each mask, its IoU with the truth (Kirillov et al., Segment Anything,
ICCV 2023). Here that estimate is calibrated, masks are listed for review by it, and it is held
against the true IoU. It speaks of how well a defect is outlined, not of whether there is one: for
that there is the detector's score.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
from scipy import optimize, special, stats

from pipeline.data.masks import iou

BAD_IOU = 0.5  # a mask under this IoU is truly bad
REVIEW = "review.csv"
REVIEW_COLUMNS = (
    "image", "image_id", "class", "score", "quality",
    "bbox_x", "bbox_y", "bbox_width", "bbox_height",
)  # fmt: skip

# Calibration

CLIP = 1e-4  # the logits of 0 and 1 are infinite; on disk a quality has four decimals
PULL = 0.05  # towards the identity: about what one mask says of the offset


@dataclass(frozen=True)
class Calibration:
    """quality = sigmoid(a * logit(predicted) + b): Platt scaling of SAM's estimate.

    Platt, Probabilistic Outputs for Support Vector Machines, 1999; Guo et al., On Calibration of
    Modern Neural Networks, ICML 2017. As a >= 0, a mask never overtakes another; the default is the
    identity. Raises `ValueError` for a negative a and for numbers that are not finite.
    """

    a: float = 1.0
    b: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite([self.a, self.b]).all() and self.a >= 0):
            raise ValueError(f"expected finite a >= 0 and b, found a = {self.a}, b = {self.b}")

    def apply(self, predicted: np.ndarray) -> np.ndarray:
        """(n,) calibrated quality in [0, 1] of SAM's estimates (n,) in [0, 1]."""
        return np.asarray(special.expit(self.a * _logit(predicted) + self.b))


def fit(predicted: np.ndarray, true: np.ndarray) -> Calibration:
    """The calibration that brings estimates (n,) closest to true IoUs (n,), both in [0, 1].

    Least squares in IoU, for that is what a quality is read as, with a weak pull towards the
    identity: from four masks the slope can hardly be told. On the given masks the squared error is
    never above that of the estimates as they are. The identity for n = 0. Raises `ValueError` for
    NaN, for values outside [0, 1], and for lengths that differ.
    """
    for values in (predicted, true):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"expected values in [0, 1], found {values}")
    if len(predicted) != len(true):
        raise ValueError(f"expected as many true IoUs as estimates, {len(predicted)}: {len(true)}")
    logits = _logit(predicted)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        a, b = parameters
        pull = np.sqrt(PULL) * np.array([a - 1, b])
        return np.hstack([special.expit(a * logits + b) - true, pull])

    found = optimize.least_squares(residuals, x0=(1, 0), bounds=((0, -np.inf), np.inf))
    return Calibration(*map(float, found.x))


def _logit(predicted: np.ndarray) -> np.ndarray:
    return np.asarray(special.logit(np.clip(predicted.astype(float), CLIP, 1 - CLIP)))


# Review


def review_list(results: Iterable[Mapping[str, Any]], below: float) -> list[Mapping[str, Any]]:
    """The COCO results whose mask has a quality under `below`, worst first."""
    listed = [entry for entry in results if entry["quality"] < below]
    return sorted(listed, key=lambda entry: entry["quality"])


def review_csv(
    listed: Iterable[Mapping[str, Any]],
    images: Iterable[Mapping[str, Any]],
    classes: Sequence[str],
) -> str:
    """A table of COCO results: one line each, with their image's name and their class."""
    names = {image["id"]: image["file_name"] for image in images}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(REVIEW_COLUMNS)
    for entry in listed:
        image_id, cls = entry["image_id"], classes[entry["category_id"] - 1]
        place = (names[image_id], image_id, cls)
        writer.writerow((*place, entry["score"], entry["quality"], *entry["bbox"]))
    return text.getvalue()


# Against the truth


@dataclass(frozen=True)
class Judged:
    """n masks of several images, with their predicted and their true IoU."""

    image: np.ndarray  # (n,) place of the mask's image among the images
    class_id: np.ndarray  # (n,) class index
    quality: np.ndarray  # (n,) predicted IoU
    iou: np.ndarray  # (n,) true IoU, see `best_ious`

    @property
    def bad(self) -> np.ndarray:
        """(n,) which masks are truly bad."""
        return self.iou < BAD_IOU

    @property
    def on_nothing(self) -> np.ndarray:
        """(n,) which masks touch no true instance of their class."""
        return self.iou == 0

    @property
    def mean_absolute_error(self) -> float:
        """Mean distance of predicted and true IoU; NaN without masks."""
        return float(np.mean(np.abs(self.quality - self.iou))) if self.iou.size else float("nan")

    @property
    def spearman(self) -> float:
        """Rank correlation of predicted and true IoU; NaN where one of them does not vary."""
        if min(len(np.unique(self.quality)), len(np.unique(self.iou))) < 2:
            return float("nan")
        return float(stats.spearmanr(self.quality, self.iou).statistic)


def judge(pairs: Iterable[tuple[sv.Detections, sv.Detections]]) -> Judged:
    """Hold masks against the truth. Each pair is an image's truth and its predicted masks."""
    rows = [
        (number, predicted.class_id[p], predicted.data["quality"][p], overlap)
        for number, (truth, predicted) in enumerate(pairs)
        for p, overlap in enumerate(best_ious(truth, predicted))
        if predicted.class_id is not None
    ]
    image, class_id, quality, ious = np.array(rows, float).reshape(-1, 4).T
    # Out of single precision, so that a quality of 0.7 is not under 0.7.
    return Judged(image.astype(int), class_id.astype(int), np.round(quality, 6), ious)


def best_ious(truth: sv.Detections, predicted: sv.Detections) -> np.ndarray:
    """(n,) IoU of each predicted mask with the true mask of its class that it fits best; else 0."""
    found = np.zeros(len(predicted))
    if truth.mask is None or predicted.mask is None:
        return found
    assert truth.class_id is not None and predicted.class_id is not None
    for p, mask in enumerate(predicted.mask):
        of_class = np.flatnonzero(truth.class_id == predicted.class_id[p])
        found[p] = max((iou(truth.mask[t], mask) for t in of_class), default=0)
    return found


def review_threshold(judged: Judged) -> float | None:
    """The quality that lists every badly drawn mask, and as little else as can be; None without.

    Badly drawn are truly bad masks that touch a true instance of their class. Masks on nothing do
    not count: their quality says nothing of them, and a single one would have all masks listed.
    The threshold is midway between the best quality of a badly drawn mask and the next quality
    above it (1 if there is none).
    """
    drawn_badly = judged.bad & ~judged.on_nothing
    if not drawn_badly.any():
        return None
    highest = judged.quality[drawn_badly].max()
    above = judged.quality[judged.quality > highest]
    return float((highest + above.min(initial=1)) / 2)
