"""Detectors that look at the same image together, each of them at several views of it.

With few examples, detectors that started from other weights, or in another random order, find
different defects, and so does one detector in the mirror image or at another scale. What is found
again and again is more probably one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import supervision as sv
import torch

from pipeline.errors import UserError
from pipeline.models import yolo_world
from pipeline.models.yolo_world import NMS_IOU, Detector


class DetectorEnsemble:
    """One or several detectors of the same classes, in any order; `classes` is the first one's.

    Each looks at the image at the given scales (1: the size it was trained with) and, with `flip`,
    at its mirror image at all of them.
    """

    def __init__(self, detectors: Sequence[Detector], scales: Sequence[float], flip: bool) -> None:
        self.classes = detectors[0].classes
        self.scales = scales
        self.flip = flip
        self._members = [
            (detector, np.array([self.classes.index(name) for name in detector.classes]))
            for detector in detectors
        ]

    def detect(self, image: np.ndarray, min_score: float, max_boxes: int) -> sv.Detections:
        """Boxes in an image, (height, width, 3) uint8 BGR, best first, in pixels of that image.

        `min_score` and `max_boxes` are those of each look at it, and the second also of all.
        """
        found = []
        for detector, index in self._members:
            for mirrored in (False, True) if self.flip else (False,):
                view = np.ascontiguousarray(image[:, ::-1]) if mirrored else image
                for scale in self.scales:
                    boxes = detector.detect(view, min_score, max_boxes, scale=scale)
                    boxes.class_id = index[boxes.class_id]
                    if mirrored:
                        boxes.xyxy[:, [0, 2]] = image.shape[1] - boxes.xyxy[:, [2, 0]]
                    found.append(boxes)
        return cast(sv.Detections, joined(found)[:max_boxes])


def load(
    checkpoints: Sequence[str],
    image_size: int | None,
    device: torch.device,
    *,
    scales: Sequence[float],
    flip: bool,
    offline: bool,
) -> DetectorEnsemble:
    """Read detectors. Raises `UserError` if they are not all of the same classes."""
    detectors = [
        Detector(yolo_world.load_model(path, offline=offline), image_size, device)
        for path in checkpoints
    ]
    first = detectors[0].classes
    for path, detector in zip(checkpoints, detectors, strict=True):
        if set(detector.classes) != set(first):
            raise UserError(
                f"--boxes: expected detectors of the same classes, {', '.join(first)}, found "
                f"{path} of {', '.join(detector.classes)}"
            )
    return DetectorEnsemble(detectors, scales, flip)


def joined(found: Sequence[sv.Detections]) -> sv.Detections:
    """What was found at each of several looks at one image, best first.

    Boxes of one class that overlap one with a higher score, as in non-maximum suppression, say the
    same as that one. Its new score is the mean over all looks, where one that has not found it
    counts 0 (as in Weighted Boxes Fusion, Solovyev et al. 2021, arXiv 1910.13302).
    """
    boxes = sv.Detections.merge(list(found))
    if len(found) == 1 or not len(boxes):
        return boxes
    scores, classes = np.asarray(boxes.confidence), np.asarray(boxes.class_id)
    member = np.repeat(np.arange(len(found)), [len(its) for its in found])
    overlap = sv.box_iou_batch(boxes.xyxy, boxes.xyxy) > NMS_IOU
    left = np.ones(len(boxes), bool)
    kept: list[int] = []
    means: list[float] = []
    for i in np.argsort(-scores, kind="stable"):
        if left[i]:
            same = left & overlap[i] & (classes == classes[i])
            best = [scores[same & (member == k)].max(initial=0) for k in range(len(found))]
            kept.append(int(i))
            means.append(float(np.mean(best)))
            left &= ~same
    order = np.argsort(-np.array(means), kind="stable")
    chosen = cast(sv.Detections, boxes[np.array(kept)[order]])
    chosen.confidence = np.array(means, np.float32)[order]
    return chosen
