"""Which predicted box found which true defect, and what that makes of the image.

Boxes are half-open pixel boxes; a box finds a defect at an IoU of 0.5 or more, as in PASCAL VOC.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import supervision as sv

MATCH_IOU = 0.5

Verdict = Literal["hit", "miss", "wrong class", "false alarm", "correct"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def match(
    truth: sv.Detections, predicted: sv.Detections, iou: float = MATCH_IOU
) -> list[tuple[int, int]]:
    """Pair true and predicted instances of one image: (truth index, predicted index), by score.

    Greedy as in COCO: predictions are taken by falling score (equal scores: as they come), and each
    takes the true instance of its own class that is still free and overlaps its box most, if their
    box IoU is at least `iou`. An instance is in one pair at most.
    """
    if not len(truth) or not len(predicted):
        return []
    assert truth.class_id is not None and predicted.class_id is not None
    assert predicted.confidence is not None
    same_class = truth.class_id[:, None] == predicted.class_id
    overlap = np.where(same_class, sv.box_iou_batch(truth.xyxy, predicted.xyxy), -1)
    return _greedy(overlap, predicted.confidence, iou)


def verdict(truth: sv.Detections, predicted: sv.Detections) -> Verdict:
    """What the predictions make of an image; they are cut at the score threshold beforehand.

    An image with several kinds of error has the worst, in this order:

    - "miss": a true instance that no box found, of whatever class;
    - "wrong class": each true instance was found, but one or more only by a box of another class;
    - "false alarm": a box left over after each true instance has taken one, or any box on a good
      image;
    - "hit": each true instance was found by a box of its class, and no box is left over;
    - "correct": a good image without boxes.
    """
    if not len(truth):
        return "false alarm" if len(predicted) else "correct"
    if not len(predicted):
        return "miss"
    assert predicted.confidence is not None
    pairs = match(truth, predicted)
    missed = np.setdiff1d(np.arange(len(truth)), [t for t, _ in pairs])
    spare = np.setdiff1d(np.arange(len(predicted)), [p for _, p in pairs])
    overlap = sv.box_iou_batch(truth.xyxy[missed], predicted.xyxy[spare])
    of_other_class = _greedy(overlap, predicted.confidence[spare], MATCH_IOU)
    if len(of_other_class) < len(missed):
        return "miss"
    if of_other_class:
        return "wrong class"
    return "false alarm" if len(spare) else "hit"


def _greedy(overlap: np.ndarray, scores: np.ndarray, iou: float) -> list[tuple[int, int]]:
    """Pairs of rows and columns of `overlap` (truths, predictions), by falling score."""
    if not len(overlap):
        return []
    overlap = overlap.copy()
    pairs = []
    for p in np.argsort(-scores, kind="stable"):
        t = int(np.argmax(overlap[:, p]))
        if overlap[t, p] >= iou:
            pairs.append((t, int(p)))
            overlap[t] = -1  # taken
    return pairs
