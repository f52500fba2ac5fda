"""Frames for people to review: panels with boxes, masks and labels, a title, a legend.

Colours are safe for colour-blind eyes: classes have the set of Okabe and Ito (2008), with white in
place of black, verdicts the "vibrant" set of Tol (2021). What a colour says is also said in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import supervision as sv
from PIL import Image, ImageDraw, ImageFont

CLASS_COLOURS = sv.ColorPalette.from_hex(
    ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF"]
)
VERDICT_COLOURS = {
    "hit": sv.Color.from_hex("#0077BB"),
    "correct": sv.Color.from_hex("#BBBBBB"),  # nothing to see
    "miss": sv.Color.from_hex("#CC3311"),
    "wrong class": sv.Color.from_hex("#EE3377"),
    "false alarm": sv.Color.from_hex("#EE7733"),
}
BACKGROUND = sv.Color.from_hex("#1D1F21")
TEXT = sv.Color.from_hex("#F2F2F2")
FAINT = sv.Color.from_hex("#A8ACB0")

SMALLEST_BOX = 12  # pixels of the panel: a smaller box is drawn this large around its centre


def ink(background: sv.Color) -> sv.Color:
    """Black or white, whichever reads better on `background` (relative luminance of WCAG 2.1)."""
    channels = np.array(background.as_rgb()) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    # equal contrast, (1 + 0.05) / (L + 0.05) = (L + 0.05) / 0.05, is at L = 0.179
    return sv.Color.BLACK if luminance > 0.179 else sv.Color.WHITE


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
        self._margin = self._border + self._gap  # from the frame's edge to what stands in it
        self._bar, self._row = round(1.7 * size), round(1.9 * size)  # height of title and text rows
        self._xs = [self._margin + i * (panel[0] + self._gap) for i in range(len(captions))]
        self._y = self._margin + self._bar + self._row
        self._template = self._draw_template(classes, captions, note)
        self.size = self._template.shape[1], self._template.shape[0]  # width, height of a frame

        line, padding = max(1, round(size / 9)), max(2, size // 5)
        self._mask = sv.MaskAnnotator(CLASS_COLOURS, opacity=0.3)
        self._outline = sv.PolygonAnnotator(CLASS_COLOURS, thickness=line)
        self._box = sv.BoxAnnotator(CLASS_COLOURS, thickness=line)
        self._label = sv.RichLabelAnnotator(
            CLASS_COLOURS,
            text_color=sv.ColorPalette([ink(colour) for colour in CLASS_COLOURS.colors]),
            font_path=str(_font_path(bold=False)),
            font_size=round(0.9 * size),
            text_padding=padding,
        )
        self._padding = padding

    def draw(
        self,
        image: np.ndarray,
        panels: Sequence[tuple[sv.Detections, Sequence[str]]],
        title: str,
        verdict: str | None,
        aside: str = "",
    ) -> np.ndarray:
        """One frame, (height, width, 3) uint8 BGR.

        `panels` holds the instances in the image's pixels and a label for each, panel by panel;
        `aside` stands at the right of the title bar.
        """
        frame = self._template.copy()
        resized, scale, corner = self._fit(image)
        for x, (detections, labels) in zip(self._xs, panels, strict=True):
            placed = self._place(detections, image.shape[:2], resized.shape[:2], scale)
            annotated = self._annotate(resized.copy(), placed, list(labels))
            left, top = x + corner[0], self._y + corner[1]
            frame[top : top + annotated.shape[0], left : left + annotated.shape[1]] = annotated
        self._draw_title(frame, title, verdict, aside)
        return frame

    def panel(
        self, image: np.ndarray, detections: sv.Detections, labels: Sequence[str]
    ) -> np.ndarray:
        """A single panel without bars: the image as large as it fits, with its instances."""
        resized, scale, _ = self._fit(image)
        placed = self._place(detections, image.shape[:2], resized.shape[:2], scale)
        return self._annotate(resized, placed, list(labels))

    def _fit(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float], tuple[int, int]]:
        """The image as large as a panel holds it, its scale (x, y), and its corner in the panel."""
        height, width = image.shape[:2]
        scale = min(self._panel[0] / width, self._panel[1] / height)
        new = max(1, round(width * scale)), max(1, round(height * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        corner = (self._panel[0] - new[0]) // 2, (self._panel[1] - new[1]) // 2
        return (
            cv2.resize(image, new, interpolation=method),
            (new[0] / width, new[1] / height),
            corner,
        )

    def _place(
        self,
        detections: sv.Detections,
        source: tuple[int, int],
        target: tuple[int, int],
        scale: tuple[float, float],
    ) -> sv.Detections:
        """Instances in a resized image's pixels; boxes closed (x2, y2 inside), not too small."""
        if not len(detections):
            return detections
        height, width = target
        boxes = detections.xyxy * np.array([*scale, *scale], np.float32)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sides = np.minimum(np.maximum(boxes[:, 2:] - boxes[:, :2], SMALLEST_BOX), target[::-1])
        low = np.clip(centres - sides / 2, 0, target[::-1] - sides)
        masks = detections.mask
        if masks is not None:
            masks = np.stack([_resize_mask(np.asarray(mask), (width, height)) for mask in masks])
        return sv.Detections(
            xyxy=np.hstack([low, low + sides - 1]),
            mask=masks,
            class_id=detections.class_id,
            confidence=detections.confidence,
        )

    def _annotate(
        self, image: np.ndarray, detections: sv.Detections, labels: list[str]
    ) -> np.ndarray:
        if not len(detections):
            return image
        image = self._mask.annotate(image, detections)
        image = self._outline.annotate(image, detections)
        image = self._box.annotate(image, detections)
        height, width = image.shape[:2]
        spots = label_spots(detections.xyxy, self._label_sizes(labels), (width, height))
        anchors = sv.Detections(xyxy=np.hstack([spots, spots + 1]), class_id=detections.class_id)
        return self._label.annotate(image, anchors, labels)

    def _label_sizes(self, labels: Sequence[str]) -> np.ndarray:
        """(n, 2): width and height of labels with their padding, as the annotator draws them."""
        corners = np.array([_font(round(0.9 * self._size)).getbbox(label) for label in labels])
        return corners[:, 2:] - corners[:, :2] + 2 * self._padding + 1

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
            draw.text((x, middle), text, FAINT.as_rgb(), _font(self._size), anchor="lm")
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
                draw.text((left, middle), name, TEXT.as_rgb(), _font(self._size), anchor="lm")
            else:
                text = elide(note, self._size, width - 2 * self._margin)
                draw.text((x, middle), text, FAINT.as_rgb(), _font(self._size), anchor="lm")
        return cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR)

    def _legend_spots(self, names: Sequence[str], width: int) -> list[tuple[int, int]]:
        """The x in pixels and the row of each legend entry, wrapped at the frame's width."""
        spots, x, row = [], self._margin, 0
        for name in names:
            needed = round(_font(self._size).getlength(name)) + 2 * self._size + self._gap
            if x > self._margin and x + needed > width - self._border:
                x, row = self._margin, row + 1
            spots.append((x, row))
            x += needed + self._gap
        return spots

    def _draw_title(self, frame: np.ndarray, title: str, verdict: str | None, aside: str) -> None:
        width = frame.shape[1] - 2 * self._margin
        strip = Image.new("RGB", (width, self._bar), BACKGROUND.as_rgb())
        draw = ImageDraw.Draw(strip)
        left, middle, font = 0, self._bar // 2, _font(self._size)
        if verdict is not None:
            colour, bold = VERDICT_COLOURS[verdict], _font(self._size, bold=True)
            word = verdict.upper()
            end = round(bold.getlength(word)) + 2 * self._gap
            draw.rounded_rectangle((0, 0, end, self._bar - 1), self._gap // 2, fill=colour.as_rgb())
            draw.text((self._gap, middle), word, ink(colour).as_rgb(), bold, anchor="lm")
            left = end + self._gap
            edge = self._border // 2
            corner = frame.shape[1] - 1 - edge, frame.shape[0] - 1 - edge
            cv2.rectangle(frame, (edge, edge), corner, colour.as_bgr(), 2 * edge + 1)
        room = width - left - round(font.getlength(aside)) - 2 * self._gap
        draw.text((left, middle), elide(title, self._size, room), TEXT.as_rgb(), font, anchor="lm")
        draw.text((width, middle), aside, FAINT.as_rgb(), font, anchor="rm")
        place = frame[self._margin :, self._margin :][: self._bar, :width]
        place[:] = cv2.cvtColor(np.asarray(strip), cv2.COLOR_RGB2BGR)


def label_spots(boxes: np.ndarray, sizes: np.ndarray, area: tuple[int, int]) -> np.ndarray:
    """Where labels hide least: (n, 2), the left and bottom of each label in pixels.

    Each of the (n, 4) boxes in turn tries rows above, below and beside itself, inside the (width,
    height) area, and takes the one that covers least of other labels and of boxes, in parts of
    their own size, so that a small box counts as much as a large one. Ten rows away are as bad as
    covering one box.
    """
    taken = np.empty((0, 4))
    height = sizes[:, 1].max()
    for (x1, y1, x2, y2), width in zip(boxes, sizes[:, 0], strict=True):
        ways = [
            (left, bottom, row)
            for row in range(8)
            for bottom in (y1 - row * height, y2 + (row + 1) * height)
            for left in (x1, x2 - width)
        ] + [(x2, y1 + height, 1), (x1 - width, y1 + height, 1)]
        lefts, bottoms, far = np.array(ways, float).T
        lefts = np.clip(lefts, 0, max(0, area[0] - width - 1))
        bottoms = np.clip(bottoms, height, max(height, area[1] - 1))
        rectangles = np.stack([lefts, bottoms - height, lefts + width, bottoms], axis=1)
        cost = 2 * _covered(rectangles, taken) + _covered(rectangles, boxes) + far / 10
        taken = np.vstack([taken, rectangles[np.argmin(cost)]])
    return taken[:, [0, 3]]


def _covered(rectangles: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each (x1, y1, x2, y2) rectangle the sum of the parts of the others that it covers."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    return (shared / (others[:, 2:] - others[:, :2] + 1).prod(axis=1)).sum(axis=1)


def elide(text: str, size: int, width: float) -> str:
    """Cut `text` in its middle to at most `width` pixels: the end of a name counts."""
    font = _font(size)
    kept = len(text)
    shown = text
    while kept > 0 and font.getlength(shown) > width:
        kept -= 1
        head = kept // 2
        shown = text[:head] + "…" + text[len(text) - (kept - head) :]
    return shown if font.getlength(shown) <= width else ""


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another (width, height); a mask with pixels keeps at least one, however small."""
    small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    if mask.any() and not small.any():
        rows, columns = np.nonzero(mask)
        small[rows * size[1] // mask.shape[0], columns * size[0] // mask.shape[1]] = True
    return small


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_path(bold)), size)


def _font_path(bold: bool) -> Path:
    """DejaVu Sans, which matplotlib brings: legible when small, and rich in letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
