"""Images of bright rectangles, `pipeline segment` on them, and boxes written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from rectangles import CLASSES, Defects, filled, write_dataset

from pipeline.config import SegmentConfig, build
from pipeline.data import predictions
from pipeline.data.files import read_json
from pipeline.data.masks import encode_rle
from pipeline.stages import segment

# Images 1 and 2 are the val split; 3 to 5 the test split.
VAL: tuple[Defects, ...] = ([("scratch", (10, 12, 40, 30))], [])
TEST: tuple[Defects, ...] = (
    [("stain", (50, 40, 90, 64)), ("scratch", (2, 2, 30, 20))],
    [],
    [("stain", (8, 40, 30, 66))],
)
HEIGHT, WIDTH = 72, 96
Entry = dict[str, Any]


def write_images_and_truth(root: Path) -> Path:
    return write_dataset(root, {"train": (), "val": VAL, "test": TEST})


def fill_boxes(
    monkeypatch: pytest.MonkeyPatch, shown: list[tuple[Any, Any]] | None = None
) -> list[str]:
    """In place of a SAM: each box, filled. Gives the prompts it was asked with, one per image.

    `shown` gets the masks and points that it was given, one pair per image.
    """
    prompts: list[str] = []

    class BoxFiller:
        @classmethod
        def load(cls, source: str, **options: object) -> BoxFiller:
            return cls()

        def segment(self, image: np.ndarray, found: sv.Detections, prompt: str) -> sv.Detections:
            prompts.append(prompt)
            if shown is not None:
                shown.append((found.mask, found.data.get("points")))
            boxes = [tuple(map(int, box)) for box in found.xyxy]
            masks = [filled(box, *image.shape[:2]) for box in boxes]  # type: ignore[arg-type]
            found.mask = np.stack(masks) if masks else None
            found.data["quality"] = np.full(len(found), 0.5, np.float32)
            return found

    monkeypatch.setattr(segment, "Segmenter", BoxFiller)
    return prompts


def run(source: Path, out: Path, boxes: object = "truth", **options: Any) -> list[Entry]:
    """Run the stage; returns the results it wrote."""
    values = {"source": source, "out": out, "boxes": str(boxes), "device": "cpu"} | options
    segment.run(build(SegmentConfig, values))
    return read_json(out / "predictions.json")


def entry(image_id: int, category: int, box: tuple[int, ...], score: float) -> Entry:
    """A COCO result of a box x1, y1, x2, y2."""
    x1, y1, x2, y2 = box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image_id, "category_id": category, "bbox": bbox, "score": score}


def detector_file(folder: Path, *classes: str) -> Path:
    """A YOLO-World-n with random weights for some classes."""
    from pipeline.models import yolo_world

    torch.manual_seed(0)
    model = yolo_world.load_model("yolov8n-worldv2.yaml")
    yolo_world.set_prompts(model, classes, None)
    path = folder / "world.safetensors"
    yolo_world.save_safetensors(yolo_world.plain(model), path, image_size=64)
    return path


def boxes_file(folder: Path, entries: list[Entry], classes: tuple[str, ...] = CLASSES) -> Path:
    predictions.write_predictions(folder, entries, [], classes)
    return folder / "predictions.json"


def brief(results: list[Entry]) -> list[tuple[int, str, list[float], float]]:
    return [(e["image_id"], CLASSES[e["category_id"] - 1], e["bbox"], e["score"]) for e in results]


def rle(box: tuple[int, int, int, int], height: int = HEIGHT, width: int = WIDTH) -> Entry:
    return encode_rle(filled(box, height, width))
