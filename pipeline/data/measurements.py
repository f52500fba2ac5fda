"""Size, orientation and place of a defect, measured on its mask.

A pixel is a unit square: the one in column x and row y reaches from (x, y) to (x + 1, y + 1). So
an upright rectangle of w x h pixels is exactly w by h, and a single pixel 1 by 1. A slanted edge is
a staircase of pixels: what lies aslant is measured about a pixel too long and too wide. The
orientation of a roundish mask means little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np

from pipeline.data.masks import box_of

LENGTHS = (  # the fields of a `Measurement` that are lengths
    "length", "width", "centroid_x", "centroid_y", "bbox_x", "bbox_y", "bbox_width", "bbox_height",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """A mask in pixels; x to the right and y down, from the image's top left corner.

    `length` and `width` are the longer and the shorter side of the smallest rectangle, at any
    angle, that holds all pixels of the mask, those of every component. `orientation` is the angle
    in degrees, in [0, 180), from the x axis to the long side, counter-clockwise as one sees it in
    the image: 0 lies, 90 stands, 45 rises to the right. Of two equal sides it is that in [0, 90).
    """

    area: int  # count of pixels
    length: float
    width: float
    orientation: float
    centroid_x: float  # mean of the pixels' centres
    centroid_y: float
    bbox_x: int  # the upright box of the mask: its top left corner and size, as in COCO
    bbox_y: int
    bbox_width: int
    bbox_height: int


def measure(mask: np.ndarray) -> Measurement:
    """Measure a (height, width) bool mask. Raises `ValueError` if it is empty."""
    x1, y1, x2, y2 = box_of(mask)
    inside = mask[y1:y2, x1:x2]
    rows, columns = np.nonzero(inside)
    length, width, orientation = _smallest_rectangle(_hull(inside))
    return Measurement(
        area=len(rows),
        length=length,
        width=width,
        orientation=orientation,
        centroid_x=x1 + float(columns.mean()) + 0.5,
        centroid_y=y1 + float(rows.mean()) + 0.5,
        bbox_x=x1,
        bbox_y=y1,
        bbox_width=x2 - x1,
        bbox_height=y2 - y1,
    )


def in_millimetres(measurement: Measurement, mm_per_px: float) -> dict[str, float]:
    """Area (`area_mm2`) and lengths (`length_mm`, ...) for square pixels of this size."""
    lengths = {f"{name}_mm": getattr(measurement, name) * mm_per_px for name in LENGTHS}
    return {"area_mm2": measurement.area * mm_per_px**2, **lengths}


def _hull(mask: np.ndarray) -> np.ndarray:
    """The corners of the convex hull of a mask's pixels: (n, 2) int64, x and y."""
    rows = np.flatnonzero(mask.any(axis=1))
    left = mask[rows].argmax(axis=1)
    right = mask.shape[1] - mask[rows, ::-1].argmax(axis=1)
    corners = [np.column_stack([x, y]) for x in (left, right) for y in (rows, rows + 1)]
    return cv2.convexHull(np.vstack(corners).astype(np.int32))[:, 0].astype(np.int64)


def _smallest_rectangle(hull: np.ndarray) -> tuple[float, float, float]:
    """Length, width and orientation of the rectangle of least area around a convex polygon.

    One of its sides lies on an edge of the polygon (Freeman and Shapira, Determining the
    minimum-area encasing rectangle for an arbitrary closed curve, CACM 18(7), 1975), so each edge
    is tried. Of equal areas the longest counts, then the one of the smallest orientation: symmetric
    shapes often tie, and what is found must not depend on how they lie. Hence whole numbers and
    fractions, where `cv2.minAreaRect` has 32-bit floats.
    """
    edges = np.roll(hull, -1, axis=0) - hull
    normals = np.column_stack([-edges[:, 1], edges[:, 0]])
    along, across = np.ptp(hull @ edges.T, axis=0), np.ptp(hull @ normals.T, axis=0)
    candidates = []
    # The extents are in units of the edge's length: whole numbers.
    for (dx, dy), a, b in zip(edges.tolist(), along.tolist(), across.tolist(), strict=True):
        square = dx * dx + dy * dy
        angle = math.degrees(math.atan2(-dy, dx)) % 180  # y points down
        if a < b:
            a, b, angle = b, a, (angle + 90) % 180
        elif a == b:
            angle %= 90
        sides = -Fraction(a * a, square), angle, Fraction(b * b, square)
        candidates.append((Fraction(a * b, square), *sides))
    _, length, orientation, width = min(candidates)
    return math.sqrt(-length), math.sqrt(width), orientation
