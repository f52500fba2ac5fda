"""A small dataset of bright rectangles on a dark ground, whose truth is known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.coco import Instance, Item, write_split, write_truth
from pipeline.data.masks import encode_rle

Box = tuple[int, int, int, int]  # half-open pixels: x1, y1, x2, y2
Defects = Sequence[tuple[str, Box]]  # of one image: class and rectangle
CLASSES = ("scratch", "stain")


def filled(box: Box, height: int, width: int) -> np.ndarray:
    """(height, width) bool, true inside the box."""
    x1, y1, x2, y2 = box
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def draw(defects: Defects, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 BGR: noise around 60, rectangles around 220."""
    image = np.random.default_rng(seed).normal(60, 8, (height, width, 3))
    for _, (x1, y1, x2, y2) in defects:
        image[y1:y2, x1:x2] += 160
    return np.clip(image, 0, 255).astype(np.uint8)


def write_dataset(
    root: Path,
    splits: Mapping[str, Sequence[Defects]],
    classes: Sequence[str] = CLASSES,
    height: int = 72,
    width: int = 96,
) -> Path:
    """Write images and truth, and return `root`. Image ids count from 1: train, val, test."""
    items: list[Item] = []
    names: dict[str, list[str]] = {part: [] for part in ("train", "val", "test")}
    (root / "images").mkdir(parents=True)
    for part in names:
        for defects in splits.get(part, ()):
            label = defects[0][0] if defects else "good"
            name = f"{label}__{len(items):03}.png"
            cv2.imwrite(str(root / "images" / name), draw(defects, height, width, len(items)))
            instances = tuple(
                Instance(cls, box, int(mask.sum()), encode_rle(mask))
                for cls, box in defects
                for mask in [filled(box, height, width)]
            )
            items.append(Item(name, width, height, instances))
            names[part].append(name)
    coco = write_truth(root, items, classes)
    write_split(root, coco, names, root)
    return root
