"""Pixel masks: run lengths, boxes, components, overlap.

A mask is a (height, width) bool array. A box is half-open in pixels, so a one-pixel mask has the
box (x, y, x + 1, y + 1).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, with `counts` as text so that it fits in JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """The (height, width) bool mask of COCO run lengths."""
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest half-open box (x1, y1, x2, y2) of a mask. Raises `ValueError` if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("expected a mask with pixels, found an empty one")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def components(mask: np.ndarray, min_area: int = 0) -> tuple[list[np.ndarray], int]:
    """Split a mask into its 8-connected components, in reading order of their boxes' corners.

    A component under `min_area` pixels joins the nearest other one (by distance between pixels), so
    the union of the result is always the mask. Returns the components and how many were joined.
    """
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    areas = np.bincount(labels.ravel(), minlength=count)
    joined = 0
    for label in sorted(range(1, count), key=lambda i: int(areas[i])):
        others = (labels > 0) & (labels != label)
        if areas[label] >= min_area or not others.any():
            continue
        distance, nearest = cv2.distanceTransformWithLabels(
            (~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE,
            labelType=cv2.DIST_LABEL_PIXEL,
        )  # fmt: skip
        own = np.argwhere(labels == label)
        row, column = own[np.argmin(distance[labels == label])]
        target = labels[others & (nearest == nearest[row, column])][0]
        areas[target] += areas[label]
        labels[labels == label] = target
        joined += 1
    parts = [labels == label for label in np.unique(labels) if label]
    return sorted(parts, key=lambda part: box_of(part)[1::-1]), joined


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks of one shape; 0 for two empty ones."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 0.0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient of two masks of one shape; 0 for two empty ones."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero(a & b) / total) if total else 0.0
