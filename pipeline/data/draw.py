"""Frames for people to review: panels with instances, a title with the verdict, a legend, insets.

What colours mean is written in pipeline/data/palette.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import supervision as sv
from PIL import Image, ImageDraw

from pipeline.data.paint import crop, paint_labels, paint_leader, paint_shapes, text_picture
from pipeline.data.palette import (
    BACKGROUND,
    CLASS_COLOURS,
    FAINT,
    TEXT,
    VERDICT_COLOURS,
    ink,
)
from pipeline.data.text import elide, font

SMALLEST_BOX = 12  # pixels of the panel: a smaller box is drawn this large around its centre
# Insets; sides are parts of the shorter side of the image as it is shown.
SMALL = 1 / 8  # an instance whose longer side is under this has an inset
INSET = 0.36  # side of an inset
AROUND = 1.4  # side of the window it shows, in longer sides of the instance: it is doubled at least
MOST_INSETS = 2
LEAST_INSET = 40  # pixels: in a smaller panel there is no room for one
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Inset:
    """A window of the image, and where it is shown enlarged."""

    window: tuple[int, int, int, int]  # half-open pixels of the image: x1, y1, x2, y2
    marked: np.ndarray  # the same in pixels of the shown image
    place: np.ndarray  # where the enlargement goes, in pixels of the shown image


@dataclass(frozen=True)
class Card:
    """What a title card says."""

    name: str
    about: Sequence[str]  # lines under the name
    figures: Sequence[tuple[str, str]]  # name and value
    classes: Mapping[int, str]  # text for each class index
    verdicts: Mapping[str, int]  # how often each was given


class ReviewDrawer:
    """Draws frames of one size: a title bar, one panel per caption side by side, a legend.

    `panel` is the (width, height) of a panel in pixels, and `note` stands at the end of the legend.
    """

    def __init__(
        self,
        classes: Sequence[str],
        captions: Sequence[str],
        panel: tuple[int, int],
        note: str = "",
    ) -> None:
        self._panel = panel
        size = max(11, round(panel[1] / 36))  # of the letters, in pixels
        self._size, self._gap, self._border = size, size // 2, max(3, size // 3)
        self._line = max(1, round(size / 9))
        self._margin = self._border + self._gap  # from the frame's edge to what stands in it
        self._bar, self._row = round(1.7 * size), round(1.9 * size)  # height of title and text rows
        self._xs = [self._margin + i * (panel[0] + self._gap) for i in range(len(captions))]
        self._y = self._margin + self._bar + self._row
        self._template = self._draw_template(classes, captions, note)
        self.size = self._template.shape[1], self._template.shape[0]  # width, height of a frame

    def draw(
        self,
        image: np.ndarray,
        panels: Sequence[tuple[sv.Detections, Sequence[str]]],
        title: str,
        verdict: str | None,
        aside: str = "",
        details: np.ndarray | None = None,
        pictures: Mapping[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """One frame, (height, width, 3) uint8 BGR.

        `panels` holds the instances in the image's pixels and a label for each, panel by panel;
        `aside` stands at the right of the title bar. The small ones among the boxes `details`
        (n, 4), in the image's pixels, are shown enlarged in every panel of the image. `pictures`
        has, by the panel's number, what is shown there in place of the image, in its size.
        """
        frame = self._template.copy()
        shown, scale, corner = self._fit(image)
        insets = [] if details is None else self._insets(details, image, shown, scale)
        for i, (x, (detections, labels)) in enumerate(zip(self._xs, panels, strict=True)):
            left, top = x + corner[0], self._y + corner[1]
            place = frame[top : top + shown.shape[0], left : left + shown.shape[1]]
            other = None if pictures is None else pictures.get(i)
            place[:] = shown if other is None else self._fit(other)[0]
            enlarged = insets if other is None else []
            self._annotate(place, image, scale, detections, labels, enlarged)
        self._draw_title(frame, title, verdict, aside)
        return frame

    def panel(
        self, image: np.ndarray, detections: sv.Detections, labels: Sequence[str]
    ) -> np.ndarray:
        """A single panel without bars: the image as large as it fits, with its instances."""
        shown, scale, _ = self._fit(image)
        shown = shown.copy()
        self._annotate(shown, image, scale, detections, labels, [])
        return shown

    def card(self, card: Card) -> np.ndarray:
        """A frame with text alone; lines that have no room are left out."""
        canvas = Image.new("RGB", self.size, BACKGROUND.as_rgb())
        draw = ImageDraw.Draw(canvas)
        left, y = self._margin + 2 * self._size, self._margin + 2 * self._size
        right, bottom = self.size[0] - left, self.size[1] - self._margin - self._row
        large = 2 * self._size
        draw.text((left, y), elide(card.name, large, right - left), TEXT.as_rgb(), font(large))
        y += 3 * self._size
        for line in card.about:
            if y > bottom:
                break
            draw.text(
                (left, y), elide(line, self._size, right - left), FAINT.as_rgb(), font(self._size)
            )
            y += self._row
        y += self._size
        for name, value in card.figures:
            if y > bottom:
                break
            value = elide(value, self._size, 0.4 * (right - left))
            room = right - left - font(self._size).getlength(value) - self._size
            draw.text((left, y), elide(name, self._size, room), FAINT.as_rgb(), font(self._size))
            draw.text((min(right, left + 30 * self._size), y), value, TEXT.as_rgb(),
                      font(self._size), anchor="ra")  # fmt: skip
            y += self._row
        chips = [(text, CLASS_COLOURS.by_idx(index)) for index, text in card.classes.items()]
        pills = [(f"{n} {word}", VERDICT_COLOURS[word]) for word, n in card.verdicts.items()]
        for row in (chips, pills):
            y = self._draw_chips(draw, row, left, y + self._size, right, bottom)
        return cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR)

    def _draw_chips(
        self,
        draw: ImageDraw.ImageDraw,
        chips: Sequence[tuple[str, sv.Color]],
        left: int,
        y: int,
        right: int,
        bottom: int,
    ) -> int:
        """Coloured words from the left, wrapped; returns the y under them."""
        x, letters = left, font(self._size)
        for text, colour in chips:
            width = round(letters.getlength(text)) + 2 * self._gap
            if x > left and x + width > right:
                x, y = left, y + self._row + self._gap
            if y > bottom:
                return y
            box = (x, y, x + width, y + self._bar)
            draw.rounded_rectangle(box, self._gap // 2, fill=colour.as_rgb())
            middle = (x + self._gap, y + self._bar // 2)
            draw.text(middle, text, ink(colour).as_rgb(), letters, anchor="lm")
            x += width + self._gap
        return y + self._row if chips else y

    def _fit(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float], tuple[int, int]]:
        """The image as large as a panel holds it, its scale (x, y), and its corner in the panel."""
        height, width = image.shape[:2]
        scale = min(self._panel[0] / width, self._panel[1] / height)
        new = max(1, round(width * scale)), max(1, round(height * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        shown = image if new == (width, height) else cv2.resize(image, new, interpolation=method)
        corner = (self._panel[0] - new[0]) // 2, (self._panel[1] - new[1]) // 2
        return shown, (new[0] / width, new[1] / height), corner

    def _annotate(
        self,
        place: np.ndarray,
        image: np.ndarray,
        scale: tuple[float, float],
        detections: sv.Detections,
        labels: Sequence[str],
        insets: Sequence[Inset],
    ) -> None:
        """Paint instances, insets and labels on the image as it is shown in `place`."""
        placed = _placed(detections, image.shape[:2], place.shape[:2], scale)
        paint_shapes(place, placed, self._line)
        for inset in insets:
            self._paint_inset(place, image, detections, inset)
        rectangles = [r for inset in insets for r in (inset.place, inset.marked)]
        avoid = np.array(rectangles, float) if rectangles else None
        paint_labels(place, placed, labels, round(0.9 * self._size), avoid)

    def _insets(
        self,
        boxes: np.ndarray,
        image: np.ndarray,
        shown: np.ndarray,
        scale: tuple[float, float],
    ) -> list[Inset]:
        """Windows around the small ones of the boxes, and the corners where they hide no box."""
        shorter = min(shown.shape[:2])
        side = round(INSET * shorter)
        if side < LEAST_INSET or not len(boxes):
            return []
        height, width = image.shape[:2]
        factors = np.array([*scale, *scale])
        corners = [
            np.array([x, y, x + side, y + side])
            for x in (self._gap, shown.shape[1] - self._gap - side)
            for y in (self._gap, shown.shape[0] - self._gap - side)
        ]
        busy = boxes * factors
        insets: list[Inset] = []
        windows: list[np.ndarray] = []
        for box in boxes:
            longer = max(*(box[2:] - box[:2]), 4)
            centre = (box[:2] + box[2:]) / 2
            known = any(_overlap(np.hstack([centre, centre + 1]), w) for w in windows)
            size = round(float(AROUND * longer))
            if longer * scale[0] >= SMALL * shorter or known or size > min(height, width):
                continue
            x, y = (
                int(np.clip(round(float(c - size / 2)), 0, limit - size))
                for c, limit in zip(centre, (width, height), strict=True)
            )
            window = (x, y, x + size, y + size)
            windows.append(np.array([window]))
            marked = np.array(window) * factors
            taken = np.vstack([busy, marked, *(i.marked for i in insets)])
            free = [c for c in corners if not _overlap(c, taken)]
            free = [c for c in free if not any((c == i.place).all() for i in insets)]
            if free and len(insets) < MOST_INSETS:
                nearest = min(free, key=lambda c: float(np.abs(c - marked).sum()))
                insets.append(Inset(window, marked, nearest))
        return insets

    def _paint_inset(
        self, place: np.ndarray, image: np.ndarray, detections: sv.Detections, inset: Inset
    ) -> None:
        x1, y1, x2, y2 = inset.window
        left, top, right, bottom = (int(v) for v in inset.place)
        side = right - left
        picture = cv2.resize(image[y1:y2, x1:x2], (side, side), interpolation=cv2.INTER_CUBIC)
        inside = crop(detections, inset.window)
        factor = side / (x2 - x1)
        placed = _placed(inside, (y2 - y1, x2 - x1), (side, side), (factor, factor))
        paint_shapes(picture, placed, self._line, fill=False, boxes=inside.mask is None)
        marked = tuple(round(float(v)) for v in inset.marked)
        for colour, line in ((BLACK, 3), (WHITE, 1)):
            cv2.rectangle(place, marked[:2], marked[2:], colour, line)
        paint_leader(place, inset.place, inset.marked, WHITE, BLACK)
        place[top:bottom, left:right] = picture
        for colour, line in ((BLACK, 4), (WHITE, 2)):
            cv2.rectangle(place, (left, top), (right - 1, bottom - 1), colour, line)
        text = f"×{factor * image.shape[1] / place.shape[1]:.0f}"
        note = text_picture(text, "#000000", round(0.9 * self._size))
        place[bottom - 2 - note.shape[0] : bottom - 2, left + 2 : left + 2 + note.shape[1]] = note

    def _draw_template(
        self, classes: Sequence[str], captions: Sequence[str], note: str
    ) -> np.ndarray:
        """All that is the same in every frame: background, captions, empty panels, legend."""
        width = self._xs[-1] + self._panel[0] + self._margin
        entries = [(name, CLASS_COLOURS.by_idx(i)) for i, name in enumerate(classes)]
        spots = self._legend_spots([name for name, _ in entries] + ([note] if note else []), width)
        rows = spots[-1][1] + 1 if spots else 0
        height = self._y + self._panel[1] + self._gap // 2 + rows * self._row + self._margin
        canvas = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND.as_rgb())
        draw = ImageDraw.Draw(canvas)
        for x, caption in zip(self._xs, captions, strict=True):
            middle = self._y - self._row // 2
            text = elide(caption, self._size, self._panel[0])
            draw.text((x, middle), text, FAINT.as_rgb(), font(self._size), anchor="lm")
            right, bottom = x + self._panel[0] - 1, self._y + self._panel[1] - 1
            draw.rectangle((x, self._y, right, bottom), fill=(0, 0, 0))
        swatch = round(0.8 * self._size)
        for i, (x, row) in enumerate(spots):
            middle = self._y + self._panel[1] + row * self._row + self._row // 2 + self._gap // 2
            if i < len(entries):
                name, colour = entries[i]
                box = (x, middle - swatch // 2, x + swatch, middle - swatch // 2 + swatch)
                draw.rounded_rectangle(box, 2, fill=colour.as_rgb())
                left = x + swatch + self._gap
                draw.text((left, middle), name, TEXT.as_rgb(), font(self._size), anchor="lm")
            else:
                text = elide(note, self._size, width - 2 * self._margin)
                draw.text((x, middle), text, FAINT.as_rgb(), font(self._size), anchor="lm")
        return cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR)

    def _legend_spots(self, names: Sequence[str], width: int) -> list[tuple[int, int]]:
        """The x in pixels and the row of each legend entry, wrapped at the frame's width."""
        spots, x, row = [], self._margin, 0
        for name in names:
            needed = round(font(self._size).getlength(name)) + 2 * self._size + self._gap
            if x > self._margin and x + needed > width - self._border:
                x, row = self._margin, row + 1
            spots.append((x, row))
            x += needed + self._gap
        return spots

    def _draw_title(self, frame: np.ndarray, title: str, verdict: str | None, aside: str) -> None:
        width = frame.shape[1] - 2 * self._margin
        strip = Image.new("RGB", (width, self._bar), BACKGROUND.as_rgb())
        draw = ImageDraw.Draw(strip)
        left, middle, letters = 0, self._bar // 2, font(self._size)
        if verdict is not None:
            colour, bold = VERDICT_COLOURS[verdict], font(self._size, bold=True)
            word = verdict.upper()
            end = round(bold.getlength(word)) + 2 * self._gap
            draw.rounded_rectangle((0, 0, end, self._bar - 1), self._gap // 2, fill=colour.as_rgb())
            draw.text((self._gap, middle), word, ink(colour).as_rgb(), bold, anchor="lm")
            left = end + self._gap
            edge = self._border // 2
            corner = frame.shape[1] - 1 - edge, frame.shape[0] - 1 - edge
            cv2.rectangle(frame, (edge, edge), corner, colour.as_bgr(), 2 * edge + 1)
        room = width - left - round(letters.getlength(aside)) - 2 * self._gap
        text = elide(title, self._size, room)
        draw.text((left, middle), text, TEXT.as_rgb(), letters, anchor="lm")
        draw.text((width, middle), aside, FAINT.as_rgb(), letters, anchor="rm")
        place = frame[self._margin :, self._margin :][: self._bar, :width]
        place[:] = cv2.cvtColor(np.asarray(strip), cv2.COLOR_RGB2BGR)


def _placed(
    detections: sv.Detections,
    source: tuple[int, int],
    target: tuple[int, int],
    scale: tuple[float, float],
) -> sv.Detections:
    """Instances in a resized image's pixels; boxes closed (x2, y2 inside), not too small.

    `source` and `target` are (height, width); `scale` is that of x and y.
    """
    if not len(detections):
        return detections
    height, width = target
    boxes = detections.xyxy * np.array([*scale, *scale], np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    sides = np.minimum(np.maximum(boxes[:, 2:] - boxes[:, :2], SMALLEST_BOX), target[::-1])
    low = np.clip(centres - sides / 2, 0, target[::-1] - sides)
    masks = detections.mask
    if masks is not None and source != target:
        masks = np.stack([_resize_mask(np.asarray(mask), (width, height)) for mask in masks])
    return sv.Detections(
        xyxy=np.hstack([low, low + sides - 1]),
        mask=masks,
        class_id=detections.class_id,
        confidence=detections.confidence,
    )


def _overlap(rectangle: np.ndarray, others: np.ndarray) -> bool:
    """Whether a rectangle (x1, y1, x2, y2) shares an area with any of the (n, 4) others."""
    low, high = np.maximum(rectangle[:2], others[:, :2]), np.minimum(rectangle[2:], others[:, 2:])
    return bool((high > low).all(axis=1).any())


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another (width, height); a mask with pixels keeps at least one, however small."""
    small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    if mask.any() and not small.any():
        rows, columns = np.nonzero(mask)
        small[rows * size[1] // mask.shape[0], columns * size[0] // mask.shape[1]] = True
    return small
