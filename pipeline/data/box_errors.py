"""What is wrong with each false alarm and each missed defect, as in TIDE.

Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020. Boxes are
half-open pixel boxes, cut at the score threshold beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import supervision as sv

from pipeline.data.matching import MATCH_IOU, match

BACKGROUND_IOU = 0.1  # a box under this IoU with every true instance is on the background

Kind = Literal["wrong class", "bad box", "both", "duplicate", "background", "missed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class BoxErrors:
    """The errors of one image, one entry per predicted and per true instance; None: no error."""

    predicted: tuple[Kind | None, ...]
    true: tuple[Kind | None, ...]  # "missed", or the "wrong class" or "bad box" that was its find

    def count(self, kind: Kind) -> int:
        """Wrong boxes of this kind; true instances, if it is "missed"."""
        return (self.true if kind == "missed" else self.predicted).count(kind)


def box_errors(truth: sv.Detections, predicted: sv.Detections) -> BoxErrors:
    """Name the error of each predicted instance that `match` leaves over; the first that fits:

    - "bad box": its best IoU with an instance of its class is at least 0.1, but under 0.5;
    - "wrong class": its IoU with an instance of another class is at least 0.5;
    - "duplicate": the same with an instance of its class, which a higher score has found;
    - "background": its IoU with every instance is under 0.1;
    - "both": what is left, a bad box around an instance of another class.

    A true instance that was not found is "missed", unless a bad box or a wrong class is its error.
    """
    pairs = match(truth, predicted)
    wrong: list[Kind | None] = [None] * len(predicted)
    lost: list[Kind | None] = ["missed"] * len(truth)
    for t, _ in pairs:
        lost[t] = None
    spare = sorted(set(range(len(predicted))) - {p for _, p in pairs})
    if not len(truth):
        for p in spare:
            wrong[p] = "background"
        return BoxErrors(tuple(wrong), tuple(lost))
    if not len(predicted):
        return BoxErrors((), tuple(lost))
    assert truth.class_id is not None and predicted.class_id is not None
    overlaps = sv.box_iou_batch(truth.xyxy, predicted.xyxy)
    same_class = truth.class_id[:, None] == predicted.class_id
    for p in spare:
        of_class = np.where(same_class[:, p], overlaps[:, p], 0)
        of_others = np.where(same_class[:, p], 0, overlaps[:, p])
        kind, t = _kind(of_class, of_others)
        wrong[p] = kind
        if lost[t] == "missed" and kind in ("bad box", "wrong class"):
            lost[t] = kind
    return BoxErrors(tuple(wrong), tuple(lost))


def _kind(of_class: np.ndarray, of_others: np.ndarray) -> tuple[Kind, int]:
    """The error of a box and the true instance it is about, by its (n,) IoUs with the truth."""
    own, other = int(np.argmax(of_class)), int(np.argmax(of_others))
    if BACKGROUND_IOU <= of_class[own] < MATCH_IOU:
        return "bad box", own
    if of_others[other] >= MATCH_IOU:
        return "wrong class", other
    if of_class[own] >= MATCH_IOU:
        return "duplicate", own
    if of_others[other] < BACKGROUND_IOU:
        return "background", other
    return "both", other
