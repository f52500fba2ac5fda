"""Instances painted on an image: translucent masks with an outline, boxes, labels with leaders.

Every coloured line has a casing, black or white, whichever stands out from its colour, so that one
of both stands out from whatever is under them. Only the pixels around an instance are touched,
which is what makes this fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import supervision as sv
from PIL import Image, ImageDraw

from pipeline.data.palette import CLASS_COLOURS, ink
from pipeline.data.text import font

OPACITY = 0.3  # of a mask's fill where the image is bright
DARK_OPACITY = 0.45  # where it is black: a tint of black is hard to see
DARK = 128  # grey level under which a fill becomes more opaque

Bgr = tuple[int, int, int]


def paint_shapes(
    image: np.ndarray, instances: sv.Detections, line: int, fill: bool = True, boxes: bool = True
) -> None:
    """Paint masks and boxes on a (height, width, 3) uint8 BGR image, in place.

    Boxes are closed, (x2, y2) inside, in the image's pixels as the masks are. `line` is the
    thickness of coloured lines in pixels. The largest mask is painted first: none is hidden.
    """
    if not len(instances):
        return
    assert instances.class_id is not None
    if instances.mask is not None:
        masks = [np.asarray(mask, np.uint8) for mask in instances.mask]
        for i in sorted(range(len(masks)), key=lambda i: -cv2.countNonZero(masks[i])):
            _paint_mask(image, masks[i], int(instances.class_id[i]), line, fill)
    if boxes:
        for box, index in zip(instances.xyxy, instances.class_id, strict=True):
            x1, y1, x2, y2 = (round(float(v)) for v in box)
            colour, casing = colours_of(int(index))
            cv2.rectangle(image, (x1, y1), (x2, y2), casing, line + 2)
            cv2.rectangle(image, (x1, y1), (x2, y2), colour, line)


def paint_labels(
    image: np.ndarray,
    instances: sv.Detections,
    labels: Sequence[str],
    size: int,
    avoid: np.ndarray | None = None,
) -> None:
    """Paint a label for each instance where it hides least, in place; a leader if it is far away.

    `size` is that of the letters in pixels, and `avoid` (n, 4) are rectangles to be left free.
    """
    if not len(instances):
        return
    assert instances.class_id is not None
    height, width = image.shape[:2]
    pictures = [
        text_picture(label, CLASS_COLOURS.by_idx(int(index)).as_hex(), size)
        for label, index in zip(labels, instances.class_id, strict=True)
    ]
    sizes = np.array([(p.shape[1], p.shape[0]) for p in pictures], float)
    marks = None if instances.mask is None else np.any(np.asarray(instances.mask, bool), axis=0)
    spots = label_spots(instances.xyxy, sizes, (width, height), marks, avoid)
    corners = np.rint(np.column_stack([spots[:, 0], spots[:, 1] - sizes[:, 1]])).astype(int)
    for (x, y), picture, box, index in zip(
        corners, pictures, instances.xyxy, instances.class_id, strict=True
    ):
        label = np.array([x, y, x + picture.shape[1], y + picture.shape[0]])
        paint_leader(image, label, box, *colours_of(int(index)))
    for (x, y), picture in zip(corners, pictures, strict=True):
        x, y = max(x, 0), max(y, 0)
        place = image[y : y + picture.shape[0], x : x + picture.shape[1]]
        place[:] = picture[: place.shape[0], : place.shape[1]]


def paint_leader(
    image: np.ndarray, label: np.ndarray, box: np.ndarray, colour: Bgr, casing: Bgr
) -> None:
    """Paint a line between two rectangles (x1, y1, x2, y2), in place, unless they nearly touch."""
    starts, ends = [], []  # x and y of the line: where the sides face, or the middle of both
    for low, high, first, last in zip(label[:2], label[2:], box[:2], box[2:], strict=True):
        middle = (max(low, first) + min(high, last)) / 2
        starts.append(round(float(high if high < first else low if last < low else middle)))
        ends.append(round(float(first if high < first else last if last < low else middle)))
    if max(abs(ends[0] - starts[0]), abs(ends[1] - starts[1])) <= 3:
        return
    cv2.line(image, starts, ends, casing, 3, cv2.LINE_AA)
    cv2.line(image, starts, ends, colour, 1, cv2.LINE_AA)


@lru_cache(maxsize=256)
def text_picture(text: str, background: str, size: int) -> np.ndarray:
    """Text as a small BGR picture on a background such as "#E69F00"."""
    colour, padding = sv.Color.from_hex(background), max(2, size // 5)
    left, _, right, _ = font(size).getbbox(text)
    _, top, _, bottom = font(size).getbbox("Aghp|")  # one height for all
    shape = (round(right - left) + 2 * padding + 1, round(bottom - top) + 2 * padding + 1)
    picture = Image.new("RGB", shape, colour.as_rgb())
    draw = ImageDraw.Draw(picture)
    draw.text((padding - left, padding - top), text, ink(colour).as_rgb(), font(size))
    return cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)


def crop(instances: sv.Detections, window: tuple[int, int, int, int]) -> sv.Detections:
    """What of the instances is in a window (x1, y1, x2, y2) of their image, in its pixels."""
    if not len(instances):
        return instances
    x1, y1, x2, y2 = window
    low, high = np.array([x1, y1]), np.array([x2, y2])
    corners = np.clip(instances.xyxy.reshape(-1, 2, 2), low, high)
    shown = (corners[:, 1] > corners[:, 0]).all(axis=1)
    masks, scores = instances.mask, instances.confidence
    return sv.Detections(
        xyxy=(corners[shown] - low).reshape(-1, 4).astype(np.float32),
        mask=None if masks is None else np.asarray(masks, bool)[shown, y1:y2, x1:x2],
        confidence=None if scores is None else scores[shown],
        class_id=np.asarray(instances.class_id)[shown],
    )


def colours_of(index: int) -> tuple[Bgr, Bgr]:
    """The BGR colour of a class and that of its casing."""
    colour = CLASS_COLOURS.by_idx(index)
    return colour.as_bgr(), ink(colour).as_bgr()


def label_spots(
    boxes: np.ndarray,
    sizes: np.ndarray,
    area: tuple[int, int],
    marks: np.ndarray | None = None,
    avoid: np.ndarray | None = None,
) -> np.ndarray:
    """Where labels hide least: (n, 2), the left and bottom of each label in pixels.

    Each of the (n, 4) boxes in turn tries rows above, below and beside itself, inside it and in the
    corners of the (width, height) area, and takes the place that covers least of other labels, of
    the rectangles to `avoid`, of the pixels of `marks` (height, width), and of boxes, in parts of
    their own size, so that a small box counts as much as a large one. Ten rows away are as bad as
    covering one box.
    """
    taken = np.empty((0, 4))
    height = sizes[:, 1].max()
    sums = None if marks is None else cv2.integral(marks.astype(np.uint8))
    for (x1, y1, x2, y2), width in zip(boxes, sizes[:, 0], strict=True):
        ways = [
            (left, bottom, row)
            for row in range(8)
            for bottom in (y1 - row * height, y2 + (row + 1) * height)
            for left in (x1, x2 - width)
        ] + [(x2, y1 + height, 1), (x1 - width, y1 + height, 1)]
        ways += [(left, bottom, 1) for bottom in (y1 + height, y2) for left in (x1, x2 - width)]
        lefts, bottoms, far = np.array(ways, float).T
        lefts = np.clip(lefts, 0, max(0, area[0] - width - 1))
        bottoms = np.clip(bottoms, height, max(height, area[1] - 1))
        labels = np.stack([lefts, bottoms - height, lefts + width, bottoms], axis=1)
        cost = far / 10
        for others, weight in ((taken, 2), (boxes, 1)):
            cost += weight * (_shared(labels, others) / (_areas(others) + 1)).sum(axis=1)
        if avoid is not None:
            cost += 3 * _shared(labels, avoid).sum(axis=1) / _areas(labels)
        if sums is not None:
            cost += _marked(sums, labels) / _areas(labels)
        taken = np.vstack([taken, labels[np.argmin(cost)]])
    return taken[:, [0, 3]]


def _areas(rectangles: np.ndarray) -> np.ndarray:
    return np.asarray((rectangles[:, 2:] - rectangles[:, :2]).prod(axis=1))


def _shared(rectangles: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m): the area that each of n rectangles (x1, y1, x2, y2) shares with each of m others."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2))


def _marked(sums: np.ndarray, rectangles: np.ndarray) -> np.ndarray:
    """The marked pixels in each rectangle; `sums` is the integral image of the marks."""
    x1, y1, x2, y2 = np.rint(rectangles).astype(int).T
    x1, x2 = np.clip((x1, x2), 0, sums.shape[1] - 1)
    y1, y2 = np.clip((y1, y2), 0, sums.shape[0] - 1)
    return np.asarray(sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1])


def _paint_mask(image: np.ndarray, mask: np.ndarray, index: int, line: int, fill: bool) -> None:
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return
    colour, casing = colours_of(index)
    inside = mask[top : top + height, left : left + width]
    if fill:
        place = image[top : top + height, left : left + width]
        grey = sum(cv2.mean(place, inside)[:3]) / 3
        opacity = OPACITY + (DARK_OPACITY - OPACITY) * max(0.0, 1 - grey / DARK)
        tinted = cv2.addWeighted(place, 1 - opacity, np.full_like(place, colour), opacity, 0)
        cv2.copyTo(tinted, inside, place)
    outlines, _ = cv2.findContours(
        inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
    )
    cv2.drawContours(image, outlines, -1, casing, line + 2)
    cv2.drawContours(image, outlines, -1, colour, line)
