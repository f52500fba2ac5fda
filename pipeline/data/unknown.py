"""Images that are anomalous though no known class was found on them.

A detector finds the classes it was trained for. An anomaly detector, which has seen good images
alone, says of any image how little it is like them. Here an image is called defective by the
detector if a box counts, whatever its class, and by the anomaly detector if its score is at its
threshold or above. It is 'anomalous, no known class' if the second alone calls it so.

Two detectors together call more images defective than one, also good ones. What the second is worth
is therefore seen against the first with a lower score threshold: that at which it calls just as
many good images defective as both do together. That threshold is chosen on the measured good images
themselves, part by part where several models measure, which is to its advantage.

Rates come with resamples: `counts` is (resamples, images), see pipeline/data/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.data import metrics
from pipeline.data.dataset import GOOD

SYSTEMS = ("detector", "detector_lowered", "anomaly", "both")


@dataclass(frozen=True)
class Unknown:
    """What both detectors say of images; all arrays are (images,)."""

    labels: np.ndarray  # true class: 0 is good, the classes follow
    part: np.ndarray  # number of the fold, or other part, whose models looked at the image
    box_score: np.ndarray  # the highest of the image's boxes, -inf without boxes
    box_threshold: np.ndarray
    anomaly_score: np.ndarray
    anomaly_threshold: np.ndarray
    reason: str  # of the anomaly threshold

    @cached_property
    def by_boxes(self) -> np.ndarray:
        return self.box_score >= self.box_threshold

    @cached_property
    def by_anomaly(self) -> np.ndarray:
        return self.anomaly_score >= self.anomaly_threshold

    @cached_property
    def without_class(self) -> np.ndarray:
        """Which images are anomalous, of no known class."""
        return self.by_anomaly & ~self.by_boxes

    def lowered(self, counts: np.ndarray) -> np.ndarray:
        """(resamples, images) the score above which a box counts for `detector_lowered`.

        It is -inf where all boxes may count.
        """
        above = np.empty(counts.shape)
        for part in np.unique(self.part):
            own = self.part == part
            drawn, good = counts[:, own], self.labels[own] == 0
            scores = self.box_score[own][good]
            allowed = drawn[:, good] @ (self.by_boxes | self.by_anomaly)[own][good]
            above[:, own] = metrics.score_above(scores, drawn[:, good], allowed)[:, None]
        return above

    def called(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """(resamples or 1, images) which images each of `SYSTEMS` calls defective."""
        return {
            "detector": self.by_boxes[None],
            "detector_lowered": self.box_score > self.lowered(counts),
            "anomaly": self.by_anomaly[None],
            "both": (self.by_boxes | self.by_anomaly)[None],
        }


def rates(
    unknown: Unknown, classes: Sequence[str], counts: np.ndarray
) -> dict[tuple[str, ...], np.ndarray]:
    """(resamples,) each rate by its keys under `unknown`, see pipeline/stages/evaluate.py."""
    groups: dict[tuple[str, ...], np.ndarray] = {
        ("false_alarm_rate",): unknown.labels == 0,
        ("recall",): unknown.labels > 0,
    }
    for k, name in enumerate(classes, start=1):
        groups["recall_per_class", name] = unknown.labels == k
    found = {
        (system, *keys): _rate(called, images, counts)
        for system, called in unknown.called(counts).items()
        for keys, images in groups.items()
    }
    for keys in groups:
        if keys != ("false_alarm_rate",):  # which is the same
            found["gain", *keys] = found["both", *keys] - found["detector_lowered", *keys]
    return found


def figures(unknown: Unknown, classes: Sequence[str]) -> dict[str, Any]:
    """The section `unknown` of metrics.json."""
    every = np.ones((1, len(unknown.labels)), int)
    found: dict[str, Any] = {
        "threshold": {"value": single(unknown.anomaly_threshold), "reason": unknown.reason},
        "images": int(unknown.without_class.sum()),
        "images_per_class": {
            name: int(unknown.without_class[unknown.labels == k].sum())
            for k, name in enumerate((GOOD, *classes))
        },
    }
    for (*groups, last), values in rates(unknown, classes, every).items():
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = None if np.isnan(values[0]) else round(float(values[0]), 6)
    found["detector_lowered"]["above_score"] = single(unknown.lowered(every))
    return found


def single(values: np.ndarray) -> float | None:
    """The value that all have, if it is finite and one; else None."""
    first = float(values.flat[0])
    return round(first, 6) if np.isfinite(first) and (values == first).all() else None


def _rate(called: np.ndarray, images: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(resamples,) the part of the drawn ones of these images that is called defective."""
    drawn = counts[:, images]
    total = drawn.sum(axis=1)
    out = np.full(len(counts), np.nan)
    return np.divide((drawn * called[:, images]).sum(axis=1), total, out=out, where=total > 0)
