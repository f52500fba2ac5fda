"""A mask as one polygon, as closely as that can be.

The polygon follows the sides of the mask's border pixels, so that its area and its box are those of
the pixels. Holes and further parts are joined to it by two lines that coincide, where the way is
shortest. A joint within the mask changes nothing. What is lost is between separate parts: the
pixels under a joint become part of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial import cKDTree

from pipeline.data.masks import iou

INSET = 0.01  # pixels from a side into the mask, so that every corner is in a pixel of the mask
Way = tuple[int, int]  # one step of rows and columns
Side = tuple[int, int, Way]  # of a pixel: the corner's row and column, and where it goes from there
# For each neighbour of a pixel: the corner that their common side starts from, clockwise.
CORNERS: dict[Way, Way] = {(-1, 0): (0, 0), (0, 1): (0, 1), (1, 0): (1, 1), (0, -1): (1, 0)}


@dataclass(frozen=True)
class Loss:
    """What a mask has lost as a polygon."""

    iou: float
    missing: int  # pixels
    added: int
    holes: int  # how many the mask has
    holes_kept: int


def polygon(mask: np.ndarray) -> np.ndarray:
    """(n, 2) float corners x, y in pixels, n >= 4, of a (height, width) bool mask with pixels."""
    loops = sorted(_loops(mask), key=len, reverse=True)
    joined = loops.pop(0)
    while loops:
        distances = [cKDTree(joined).query(loop) for loop in loops]
        nearest = min(range(len(loops)), key=lambda i: float(distances[i][0].min()))
        loop, (distance, places) = loops.pop(nearest), distances[nearest]
        there = int(np.argmin(distance))
        here = int(places[there])
        around = np.roll(loop, -there, axis=0)
        joined = np.concatenate([joined[: here + 1], around, around[:1], joined[here:]])
    before, after = np.roll(joined, 1, axis=0) - joined, np.roll(joined, -1, axis=0) - joined
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    straight = (turn == 0) & ((before * after).sum(axis=1) < 0)
    return joined[~straight]


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """The closed lines around the mask's parts and holes: (n, 2) x, y of each corner of a pixel.

    Pixels that touch at a corner alone are separate parts, and holes that do are one.
    """
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(mask)
    sides: set[Side] = set()
    for (down, right), (row, column) in CORNERS.items():
        outer = ~padded[rows + 1 + down, columns + 1 + right]
        starts = zip((rows + row)[outer].tolist(), (columns + column)[outer].tolist(), strict=True)
        sides.update((*start, (right, -down)) for start in starts)
    left, loops = set(sides), []
    while left:
        first = side = min(left)
        loop = []
        while True:
            left.remove(side)
            following = _following(side, sides)
            inward = {_right_of(side[2]), _right_of(following[2])}
            loop.append(
                (
                    following[1] + INSET * sum(way[1] for way in inward),
                    following[0] + INSET * sum(way[0] for way in inward),
                )
            )
            side = following
            if side == first:
                break
        loops.append(np.array(loop))
    return loops


def _following(side: Side, sides: set[Side]) -> Side:
    """The next side around the same part of the mask, which is to the right of all sides."""
    row, column, way = side
    right = _right_of(way)
    for turned in (right, way, (-right[0], -right[1])):
        following = (row + way[0], column + way[1], turned)
        if following in sides:
            return following
    raise AssertionError("the sides of a mask are closed lines")


def _right_of(way: Way) -> Way:
    return way[1], -way[0]


def filled(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """The (height, width) bool mask of a polygon (n, 2) in pixels, as Ultralytics fills it.

    The pixels that corners are in and those on the lines between them are inside.
    """
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
    return mask.astype(bool)


def loss(before: np.ndarray, after: np.ndarray) -> Loss:
    """What has become of a (height, width) bool mask."""
    missing, added = int((before & ~after).sum()), int((after & ~before).sum())
    holes, count = _holes(before)
    # A hole is kept if some of it is still one.
    kept = np.unique(holes[_holes(after)[0] > 0])
    return Loss(iou(before, after), missing, added, count, int(np.count_nonzero(kept)))


def _holes(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The holes of a mask, numbered from 1, and their count: what is outside, but not around it."""
    count, labels = cv2.connectedComponents(
        np.pad(~mask, 1, constant_values=True).astype(np.uint8), connectivity=4
    )
    labels = np.where(labels > 0, labels - labels[0, 0], 0)
    return np.maximum(labels, 0)[1:-1, 1:-1], count - 2
