"""A page of every missed defect and every false alarm: a folder to open in a browser.

errors/index.html with small JPEG pictures beside it: it needs no network and no JavaScript. Each
error is a pair of crops around it, the truth and all boxes of the model, also those under the
threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import cv2
import jinja2
import numpy as np
import supervision as sv

from pipeline.data.box_errors import BoxErrors, Kind
from pipeline.data.dataset import GOOD, Sample
from pipeline.data.draw import ReviewDrawer
from pipeline.data.files import atomic_folder, write_text
from pipeline.data.paint import crop
from pipeline.errors import UserError

SHOWN_FROM = 0.05  # score from which a box is drawn
SIDE = 360  # pixels of a picture
LEAST_CROP = 1 / 3  # part of the image's longer side
MOST_PICTURES = 300  # pairs, the surest errors first: a threshold of 0 makes thousands of errors
GROUPS = ("false alarm", "missed")
TEMPLATE = Path(__file__).with_name("error_page.html")


@dataclass(frozen=True)
class Shot:
    """One image with what the model saw in it."""

    sample: Sample
    seen: sv.Detections  # all predictions
    found: sv.Detections  # those from the threshold on
    errors: BoxErrors  # of `found`
    unknown: bool = False  # an anomaly detector finds the image anomalous, and no box counts


@dataclass(frozen=True)
class Mistake:
    """A false alarm or a missed defect."""

    shot: Shot
    group: Literal["false alarm", "missed"]
    kind: Kind
    class_id: int
    box: np.ndarray  # half-open pixels: x1, y1, x2, y2
    score: float  # of the false alarm; of a miss, the best one of all boxes that overlap it, or 0


def write(folder: Path, classes: Sequence[str], shots: Sequence[Shot]) -> None:
    """Write the page, in place of an older one. An image that cannot be read has no pictures."""
    mistakes = sorted((m for shot in shots for m in _mistakes(shot)), key=lambda m: -m.score)
    drawer = ReviewDrawer(classes, ("",), (SIDE, SIDE))
    with atomic_folder(folder) as work:
        rows = [
            {
                "group": mistake.group,
                "kind": mistake.kind,
                "class": classes[mistake.class_id],
                "score": f"{mistake.score:.2f}",
                "image": mistake.shot.sample.path.name,
                "unknown": mistake.shot.unknown,
                "truth": _true_classes(mistake.shot, classes),
                "box": [round(float(v)) for v in mistake.box],
                "pictures": _draw(work, number, mistake, drawer, classes),
            }
            for number, mistake in enumerate(mistakes)
        ]
        template = jinja2.Template(
            TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True
        )
        groups = [(name, [r for r in rows if r["group"] == name]) for name in GROUPS]
        page = template.render(
            groups=groups, images=len(shots), shown_from=SHOWN_FROM, most=MOST_PICTURES
        )
        write_text(work / "index.html", page)


def _mistakes(shot: Shot) -> Iterator[Mistake]:
    truth, found, seen = shot.sample.truth, shot.found, shot.seen
    for p, kind in enumerate(shot.errors.predicted):
        if kind is not None:
            assert found.class_id is not None and found.confidence is not None
            score = float(found.confidence[p])
            yield Mistake(shot, "false alarm", kind, int(found.class_id[p]), found.xyxy[p], score)
    for t, kind in enumerate(shot.errors.true):
        if kind is not None:
            assert truth.class_id is not None
            score = 0.0
            if len(seen):
                assert seen.confidence is not None
                overlaps = sv.box_iou_batch(truth.xyxy[[t]], seen.xyxy)[0] > 0
                score = float(seen.confidence[overlaps].max(initial=0.0))
            yield Mistake(shot, "missed", kind, int(truth.class_id[t]), truth.xyxy[t], score)


def _true_classes(shot: Shot, classes: Sequence[str]) -> str:
    ids = shot.sample.truth.class_id
    return ", ".join(sorted({classes[k] for k in ids})) if ids is not None and len(ids) else GOOD


def _draw(
    work: Path, number: int, mistake: Mistake, drawer: ReviewDrawer, classes: Sequence[str]
) -> dict[str, str] | None:
    """Write the two pictures, truth and model; their names, or None if there are none."""
    if number >= MOST_PICTURES:
        return None
    try:
        image = mistake.shot.sample.image()
    except UserError:  # gone, or damaged since
        return None
    window = _window(mistake.box, image.shape[:2])
    x1, y1, x2, y2 = window
    cut = np.ascontiguousarray(image[y1:y2, x1:x2])
    truth, seen = mistake.shot.sample.truth, mistake.shot.seen
    if seen.confidence is not None:
        seen = cast(sv.Detections, seen[seen.confidence >= SHOWN_FROM])
    names = {}
    for side, instances in (("truth", truth), ("model", seen)):
        placed = crop(instances, window)
        picture = drawer.panel(cut, placed, _labels(placed, classes))
        names[side] = f"{number:04}_{side}.jpg"
        encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        (work / names[side]).write_bytes(encoded.tobytes())
    return names


def _window(box: np.ndarray, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """A square around a box, three times its longer side, as far as the image goes."""
    height, width = shape
    wanted = max(3 * max(box[2] - box[0], box[3] - box[1]), LEAST_CROP * max(shape))
    window = []
    for low, high, side in ((box[0], box[2], width), (box[1], box[3], height)):
        size = min(round(float(wanted)), side)
        start = min(max(round(float(low + high) / 2 - size / 2), 0), side - size)
        window.append((start, start + size))
    (x1, x2), (y1, y2) = window
    return x1, y1, x2, y2


def _labels(instances: sv.Detections, classes: Sequence[str]) -> list[str]:
    if not len(instances):
        return []
    assert instances.class_id is not None
    labels = [classes[k] for k in instances.class_id]
    if instances.confidence is None:
        return labels
    return [f"{name} {s:.2f}" for name, s in zip(labels, instances.confidence, strict=True)]
