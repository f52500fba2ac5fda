"""Pixel masks: run lengths, boxes, components, overlap.

A mask is a (height, width) bool array. A box is half-open in pixels, so a one-pixel mask has the
box (x, y, x + 1, y + 1).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import supervision as sv
from pycocotools import mask as coco_mask

from pipeline.data.matching import MATCH_IOU


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, with `counts` as text so that it fits in JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """The (height, width) bool mask of COCO run lengths."""
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def is_rle(value: Any, shape: tuple[int, int]) -> bool:
    """Whether these are COCO's compressed run lengths of a (height, width) mask.

    `decode_rle` itself would leave the pixels beyond the last run undefined.
    """
    try:
        if tuple(value["size"]) != shape:
            return False
        return encode_rle(decode_rle(value))["counts"] == value["counts"]
    except (TypeError, KeyError, ValueError):
        return False


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest half-open box (x1, y1, x2, y2) of a mask. Raises `ValueError` if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("expected a mask with pixels, found an empty one")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fitted_boxes(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The boxes (n, 4), each exchanged for that of its mask where the two match.

    A mask follows edges more closely than a detector's box does. But where it is empty or far from
    the box that SAM was shown, the box is the better guess. `masks` is (n, height, width) bool.
    """
    fitted = np.array(boxes, np.float32)
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        tight = np.array([box_of(masks[i])], np.float32)
        if sv.box_iou_batch(tight, fitted[i : i + 1])[0, 0] >= MATCH_IOU:
            fitted[i] = tight[0]
    return fitted


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


def clean(mask: np.ndarray, below: int) -> np.ndarray:
    """The mask without islands, and then without holes, of fewer than `below` pixels.

    Islands are 8-connected; the largest one stays, however small it is. Holes are 4-connected parts
    of the background that do not reach the border of the mask.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    stays = areas >= below
    if len(areas) > 1:
        stays[1 + np.argmax(areas[1:])] = True
    stays[0] = False  # the background
    mask = stays[labels]
    _, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    left, top, width, height, area = stats.T
    right, bottom = mask.shape[1] - left - width, mask.shape[0] - top - height
    fills = (area < below) & (np.minimum.reduce([left, top, right, bottom]) > 0)
    fills[0] = False  # the mask
    return mask | fills[labels]


def resolve_overlaps(instances: np.ndarray, classes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Instances (n, height, width) that share no pixel with another one of their class.

    A pixel that several instances of a class claim goes to the one with the highest score; of equal
    scores, to the earliest. So an instance may end without pixels. `classes` and `scores` are (n,).
    """
    resolved = instances.copy()
    taken: dict[int, np.ndarray] = {}
    for i in np.argsort(-scores, kind="stable"):
        others = taken.setdefault(int(classes[i]), np.zeros(instances.shape[1:], bool))
        resolved[i] &= ~others
        others |= resolved[i]
    return resolved


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks of one shape; 0 for two empty ones."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 0.0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice coefficient of two masks of one shape; 0 for two empty ones."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return float(2 * np.count_nonzero(a & b) / total) if total else 0.0


def boundary_f1(a: np.ndarray, b: np.ndarray, tolerance: float = 2.0) -> float:
    """F1 of two masks' boundaries: how well the outlines of two masks of one shape agree.

    A boundary pixel is a pixel of the mask that has one of its four neighbours, or the image's
    border, on the outside. It is matched if a boundary pixel of the other mask is at most
    `tolerance` pixels away, from centre to centre. F1 is the harmonic mean of both masks' matched
    parts, so the order of the masks does not count; 0 if either mask is empty. Csurka et al., What
    is a good evaluation measure for semantic segmentation?, BMVC 2013; with a tolerance in pixels,
    as in DAVIS (Perazzi et al., CVPR 2016).
    """
    if not a.any() or not b.any():
        return 0.0
    edge_a, edge_b = _boundary(a), _boundary(b)
    matched_a = float(np.mean(_distance_to(edge_b)[edge_a] <= tolerance))
    matched_b = float(np.mean(_distance_to(edge_a)[edge_b] <= tolerance))
    both = matched_a + matched_b
    return 2 * matched_a * matched_b / both if both else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have one of their four neighbours outside of it."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inner == 0)


def _distance_to(pixels: np.ndarray) -> np.ndarray:
    """Euclidean distance of every pixel to the nearest of `pixels`, of which there are some."""
    return cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
