"""Images that are anomalous though no known class was found on them.

A detector finds the classes it was trained for. An anomaly detector, which has seen good images
alone, says of any image how little it is like them. Here an image is called defective by the
detector if a box counts, whatever its class, and by the anomaly detector if its score is at its
threshold or above. It is 'anomalous, no known class' if the second alone calls it so.

Two detectors together call more images defective than one, also good ones. What the second is worth
is therefore seen against the first with a lower score threshold: that at which it calls just as
many good images defective as both do together. That threshold is chosen on the measured good images
themselves, part by part where several models measure, which is to its advantage. Of images with
equal scores, such as all those without a box, that part counts as called defective that makes the
rates equal: the mean over all choices of images by chance, as ROC curves have it.

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

    def lowered(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The score above which a box counts for `detector_lowered`, both (resamples, images).

        And the part that counts of the images with this very score, NaN without good images. A
        score of -inf is that of images without a box.
        """
        above, share = np.empty(counts.shape), np.empty(counts.shape)
        both = self.by_boxes | self.by_anomaly
        for part in np.unique(self.part):
            own = self.part == part
            good = own & (self.labels == 0)
            drawn, scores = counts[:, good], self.box_score[good]
            allowed = drawn @ both[good]
            limit = metrics.score_above(scores, drawn, allowed)[:, None]
            tied = (drawn * (scores == limit)).sum(axis=1)
            left = allowed - (drawn * (scores > limit)).sum(axis=1)
            rest = np.divide(left, tied, out=np.ones(len(counts)), where=tied > 0)
            rest[drawn.sum(axis=1) == 0] = np.nan  # without good images there is no rate to equal
            above[:, own], share[:, own] = limit, rest[:, None]
        return above, share

    def called(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """(resamples or 1, images) what part of an image each of `SYSTEMS` calls defective.

        It is 0 or 1, but for images at the limit of `lowered`.
        """
        above, share = self.lowered(counts)
        return {
            "detector": self.by_boxes[None],
            "detector_lowered": (self.box_score > above) + share * (self.box_score == above),
            "anomaly": self.by_anomaly[None],
            "both": (self.by_boxes | self.by_anomaly)[None],
        }


def rates(
    unknown: Unknown, classes: Sequence[str], counts: np.ndarray
) -> dict[tuple[str, ...], np.ndarray]:
    """(resamples,) each rate by its keys under `unknown`, see docs/metrics.md."""
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
    above, share = unknown.lowered(every)
    found["detector_lowered"] |= {"above_score": single(above), "share_at_score": single(share)}
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
