"""Grey images with known defects and predictions, their review video, and how to read it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.config import OverlayConfig, build
from pipeline.data import palette
from pipeline.data.files import write_json
from pipeline.data.masks import encode_rle
from pipeline.data.predictions import write_predictions
from pipeline.data.video import frames
from pipeline.stages import overlay

CLASSES = ("crack", "stain")
SIZE = 100  # width and height of the images
BOX = (10, 20, 40, 60)  # where the defects are: x1, y1, x2, y2
OTHER = (60, 20, 90, 60)
# name, grey level of the image, true (class, box), predicted (class, box, score), verdict
IMAGES: list[tuple[str, int, list[Any], list[Any], str]] = [
    ("crack__a.png", 40, [(0, BOX)], [(0, BOX, 0.9)], "hit"),
    ("crack__b.png", 60, [(0, BOX)], [(0, (10, 20, 40, 50), 0.8)], "hit"),  # IoU 0.75
    ("crack__c.png", 80, [(0, BOX)], [(1, BOX, 0.7)], "wrong class"),
    ("good__a.png", 100, [], [], "correct"),
    ("good__b.png", 120, [], [(1, BOX, 0.4)], "false alarm"),
    ("good__c.png", 140, [], [(1, BOX, 0.6)], "false alarm"),
    ("good__d.png", 160, [], [(1, BOX, 0.1)], "correct"),  # under the threshold
    ("stain__a.png", 180, [(1, BOX)], [], "miss"),
    ("stain__b.png", 200, [(1, BOX), (1, OTHER)], [(1, BOX, 0.9)], "miss"),  # half is found
]
BY_CLASS = [40, 60, 80, 180, 200, 100, 120, 140, 160]
BY_ERROR = [80, 180, 200, 140, 120, 60, 40, 100, 160]


def rectangle(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def instance(image_id: int, cls: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": cls + 1,
        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
        "segmentation": encode_rle(rectangle(box)),
    }


def write_image(path: Path, level: int) -> None:
    assert cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), level, np.uint8))


def write_data(root: Path, images: list[tuple[str, int, list[Any], list[Any], str]]) -> None:
    """A dataset in `root/data` and predictions in `root/predictions`."""
    (root / "data" / "images").mkdir(parents=True)
    coco_images: list[Any] = []
    annotations: list[Any] = []
    results: list[Any] = []
    for image_id, (name, level, truth, predicted, _) in enumerate(images, start=1):
        write_image(root / "data" / "images" / name, level)
        coco_images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for cls, box in truth:
            entry = instance(image_id, cls, box) | {"area": 1, "id": len(annotations) + 1}
            annotations.append(entry | {"iscrowd": 0})
        for cls, box, score in predicted:
            results.append(instance(image_id, cls, box) | {"score": score, "quality": 0.5})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    coco = {"images": coco_images, "annotations": annotations, "categories": categories}
    for stem in ("instances", "instances_test"):
        write_json(root / "data" / "annotations" / f"{stem}.json", coco)
    write_predictions(root / "predictions", results, coco_images, CLASSES)


def configured(root: Path, out: Path, **options: Any) -> OverlayConfig:
    values: dict[str, Any] = {
        "source": root / "data",
        "predictions": root / "predictions",
        "out": out,
    }
    values |= {"height": 200, "seconds_per_image": 0.1, "title_seconds": 0}
    return build(OverlayConfig, values | options)


def film(root: Path, out: Path, **options: Any) -> list[np.ndarray]:
    """The frames of a review video."""
    overlay.run(configured(root, out, **options))
    return [frame.image for frame in frames(out)]


def level_of(image: np.ndarray) -> int:
    """The grey level of the image shown: of a corner of the first panel where no defect is."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    inside = (rows > 190) & (rows < 225) & (columns > 30) & (columns < 60)
    return int(round(np.median(image[inside]) / 20) * 20)


def verdict_of(image: np.ndarray) -> str:
    """The verdict whose colour the frame's border has."""
    border = image[2, image.shape[1] // 2].astype(int)
    distance = {v: np.abs(border - c.as_bgr()).sum() for v, c in palette.VERDICT_COLOURS.items()}
    return min(distance, key=lambda word: distance[word])
