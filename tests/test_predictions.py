"""predictions.json and images.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from rectangles import filled
from segmented import entry

from pipeline.data import predictions
from pipeline.data.files import write_json
from pipeline.data.masks import decode_rle
from pipeline.errors import UserError


def test_coco_results_and_back() -> None:
    found = sv.Detections(
        xyxy=np.array([[1, 2, 11, 22], [0.5, 0.25, 30.75, 8]], np.float32),
        class_id=np.array([1, 0]),
        confidence=np.array([0.25, 1], np.float32),
        mask=np.stack([filled((1, 2, 11, 22), 30, 40), filled((3, 3, 4, 4), 30, 40)]),
        data={"quality": np.array([0.75, 0.5], np.float32)},
    )
    results = predictions.coco_results(7, found)
    assert [{k: v for k, v in e.items() if k != "segmentation"} for e in results] == [
        {"image_id": 7, "category_id": 2, "bbox": [1, 2, 10, 20], "score": 0.25, "quality": 0.75},
        {"image_id": 7, "category_id": 1, "bbox": [0.5, 0.25, 30.25, 7.75], "score": 1,
         "quality": 0.5},
    ]  # fmt: skip
    assert decode_rle(results[0]["segmentation"]).sum() == 200
    back = predictions.from_coco_results(json.loads(json.dumps(results)))
    for name in ("xyxy", "class_id", "confidence", "mask"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name), name)
    np.testing.assert_array_equal(back.data["quality"], found.data["quality"])


def test_results_without_masks_or_of_nothing() -> None:
    bare = entry(1, 2, (1, 2, 3, 4), 0.5)
    assert predictions.from_coco_results([bare]).mask is None
    assert len(predictions.from_coco_results([])) == 0
    assert predictions.coco_results(1, sv.Detections.empty()) == []


def test_results_are_grouped_by_image(tmp_path: Path) -> None:
    entries = [entry(i, 1, (1, 2, 3, 4), 0.5) for i in (2, 9, 2)]
    write_json(tmp_path / "a.json", entries)
    found = predictions.read_results(tmp_path / "a.json")
    assert found == {2: [entries[0], entries[2]], 9: [entries[1]]}


def test_images_json_of_another_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "images.json", [])
    with pytest.raises(UserError, match="expected COCO images and categories, found other JSON"):
        predictions.read_images(tmp_path)
