"""A small run whose results are known by construction: what `pipeline report` is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rectangles import CLASSES, Box, Defects, filled, write_dataset

from pipeline import cli
from pipeline.data import heatmaps
from pipeline.data.masks import encode_rle
from pipeline.data.predictions import write_predictions

HEIGHT, WIDTH = 72, 96
SCRATCH: Box = (10, 10, 30, 22)
STAIN: Box = (60, 40, 84, 60)
OFF: Box = (12, 11, 32, 23)  # finds SCRATCH
FAR: Box = (40, 2, 52, 12)  # finds nothing

Found = tuple[str, Box, float, float]  # class, box, score, quality

# Image by image: what is true, and what is found, with the image's verdict at 0.5.
TEST: list[tuple[Defects, list[Found]]] = [
    ([("scratch", SCRATCH)], [("scratch", OFF, 0.9, 0.8), ("stain", FAR, 0.12, 0.3)]),  # hit
    ([("scratch", SCRATCH)], [("scratch", SCRATCH, 0.41, 0.9)]),  # miss
    ([("scratch", SCRATCH), ("stain", STAIN)], [("scratch", OFF, 0.85, 0.7)]),  # miss
    ([("stain", STAIN)], [("scratch", STAIN, 0.7, 0.95)]),  # wrong class
    ([("stain", STAIN)], [("stain", STAIN, 0.66, 0.9), ("scratch", FAR, 0.6, 0.4)]),  # false alarm
    ([], [("stain", FAR, 0.55, 0.35)]),  # false alarm
    ([], [("scratch", FAR, 0.3, 0.5), ("stain", STAIN, 0.2, 0.6)]),  # correct
    ([], []),  # correct
    ([], [("stain", FAR, 0.45, 0.5)]),  # correct
    ([("stain", STAIN)], []),  # miss
]
VAL: list[tuple[Defects, list[Found]]] = [
    ([("scratch", SCRATCH)], [("scratch", SCRATCH, 0.8, 0.9)]),
    ([], [("stain", FAR, 0.25, 0.4)]),
    ([("stain", STAIN)], [("stain", STAIN, 0.35, 0.8)]),
]
TRAIN: Sequence[Defects] = [[("scratch", SCRATCH)], []]
FIRST = 1 + len(TRAIN) + len(VAL)  # id of the first test image


def results(image_id: int, found: Sequence[Found]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": CLASSES.index(name) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": encode_rle(filled((x1, y1, x2, y2), HEIGHT, WIDTH)),
            "quality": quality,
        }
        for name, (x1, y1, x2, y2), score, quality in found
    ]


def write_run(root: Path, video: bool = True) -> Path:
    """`dataset`, `predictions`, `evaluation` (threshold 0.5) and `review.mp4` in `root`."""
    splits = {"train": TRAIN, "val": [t for t, _ in VAL], "test": [t for t, _ in TEST]}
    data = write_dataset(root / "dataset", splits, height=HEIGHT, width=WIDTH)
    entries, images = [], []
    every = [(truth, []) for truth in TRAIN] + VAL + TEST
    for image_id, (truth, found) in enumerate(every, start=1):
        if image_id > len(TRAIN):
            name = f"{truth[0][0] if truth else 'good'}__{image_id - 1:03}.png"
            image = {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT}
            images.append(image)
            entries += results(image_id, found)
    write_predictions(root / "predictions", entries, images, CLASSES)
    evaluate(root, root / "evaluation", 0.5)
    if video:
        shown = ["--source", str(data), "--predictions", str(root / "predictions")]
        fast = ["--height", "96", "--seconds-per-image", "0.4", "--threshold", "0.5"]
        cli.main(["overlay", *shown, *fast, "--out", str(root / "review.mp4")])
    return root


def write_heat_maps(root: Path) -> Path:
    """Heat maps in `root / "anomaly"` of two test images: ramps from 0 to 1, and from 0 to 9."""
    folder = root / "anomaly"
    entries = []
    for high, image_id in ((1.0, FIRST), (9.0, FIRST + 1)):
        name = f"scratch__{image_id - 1:03}.png"
        ramp = np.tile(np.linspace(0, high, WIDTH, dtype=np.float32), (HEIGHT, 1))
        entry = {"id": image_id, "file_name": name, "width": WIDTH, "height": HEIGHT}
        entry |= {"split": "test", "class": "scratch", "score": high}
        entries.append({**entry, "heat_map": heatmaps.write_heat_map(folder, name, ramp)})
    heatmaps.write_scores(folder, entries)
    return folder


def evaluate(root: Path, out: Path, threshold: float) -> None:
    given = ["--data", str(root / "dataset"), "--predictions", str(root / "predictions")]
    cli.main(
        ["evaluate", *given, "--threshold", str(threshold), "--resamples", "20", "--out", str(out)]
    )


def report(root: Path, out: Path, *more: str) -> Path:
    given = [
        *("--data", str(root / "dataset"), "--predictions", str(root / "predictions")),
        *("--evaluation", str(root / "evaluation")),
    ]
    cli.main(["report", *given, "--out", str(out), *more])
    return out
