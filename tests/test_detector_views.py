"""A detector that looks at an image several times: what it finds is joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from segmented import detector_file

from pipeline.models import yolo_world
from pipeline.models.yolo_world import joined


def found(*boxes: tuple[float, int, tuple[int, int, int, int]]) -> sv.Detections:
    """(score, class, box) of each."""
    if not boxes:
        return sv.Detections.empty()
    scores, classes, corners = zip(*boxes, strict=True)
    return sv.Detections(
        xyxy=np.array(corners, np.float32),
        confidence=np.array(scores, np.float32),
        class_id=np.array(classes),
    )


def as_list(boxes: sv.Detections) -> list[tuple[float, int, tuple[int, ...]]]:
    assert boxes.confidence is not None and boxes.class_id is not None
    return [
        (round(float(score), 4), int(cls), tuple(map(int, box)))
        for score, cls, box in zip(boxes.confidence, boxes.class_id, boxes.xyxy, strict=True)
    ]


A, NEAR_A, FAR = (0, 0, 100, 100), (5, 0, 100, 100), (200, 0, 260, 50)


def test_what_is_found_again_comes_before_what_one_look_is_sure_of() -> None:
    one = found((0.5, 0, A), (0.8, 1, FAR))
    two = found((0.6, 0, NEAR_A))
    assert as_list(joined([one, two])) == [(0.55, 0, NEAR_A), (0.4, 1, FAR)]


def test_classes_stay_apart() -> None:
    assert as_list(joined([found((0.5, 0, A)), found((0.6, 1, NEAR_A))])) == [
        (0.3, 1, NEAR_A),
        (0.25, 0, A),
    ]


def test_each_look_counts_once() -> None:
    """Of two boxes of one look that say the same, the better counts."""
    one = found((0.9, 0, A), (0.3, 0, NEAR_A))
    assert as_list(joined([one, found((0.1, 0, A))])) == [(0.5, 0, A)]


def test_one_look_alone_is_left_as_it_is() -> None:
    boxes = found((0.9, 0, A), (0.3, 0, NEAR_A))
    assert as_list(joined([boxes])) == as_list(boxes)


def test_nothing_found() -> None:
    assert len(joined([found(), found()])) == 0
    assert as_list(joined([found(), found((0.5, 0, A))])) == [(0.25, 0, A)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(detector_file(tmp_path_factory.mktemp("detector"), "scratch", "stain"))


def load(path: str, image_size: int | None = None, **views: Any) -> yolo_world.Detector:
    model = yolo_world.load_model(path, offline=True)
    return yolo_world.Detector(model, image_size, torch.device("cpu"), **views)


def test_mirror_image_is_a_second_look(path: str) -> None:
    """What is found there comes back to where it is; an image and its mirror image agree."""
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    mirror = np.ascontiguousarray(image[:, ::-1])
    looking = load(path, flip=True)
    found, mirrored = (as_list(looking.detect(its, 0, 300)) for its in (image, mirror))
    assert found and len(found) == len(mirrored)
    back = [(score, cls, (96 - x2, y1, 96 - x1, y2)) for score, cls, (x1, y1, x2, y2) in mirrored]
    for (score, cls, box), (s, c, b) in zip(sorted(found), sorted(back), strict=True):
        assert (score, cls) == (pytest.approx(s, abs=1e-4), c)
        assert np.abs(np.subtract(box, b)).max() <= 1  # both are cut to whole pixels
    assert found != as_list(load(path).detect(image, 0, 300))


def test_scales_are_parts_of_the_size_it_was_trained_with(path: str) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    once, twice, larger, both = (
        as_list(detector.detect(image, 0, 300))
        for detector in (
            load(path),
            load(path, scales=(2.0,)),
            load(path, 128),
            load(path, scales=(1.0, 2.0)),
        )
    )
    assert twice == larger != once
    assert both not in (once, twice)
    scores = [score for score, *_ in both]
    assert scores == sorted(scores, reverse=True)
    assert {(cls, box) for _, cls, box in both} <= {(c, b) for _, c, b in (*once, *twice)}


def test_sizes_are_rounded_to_what_the_network_can_see(path: str) -> None:
    image = np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    odd, even = (as_list(load(path, size).detect(image, 0, 300)) for size in (70, 64))
    assert odd == even != []
    load(path, 1).detect(image, 0, 300)


def test_most_boxes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each look, and of all together."""
    looks = iter([found((0.5, 0, A), (0.4, 1, A)), found((0.3, 0, FAR), (0.9, 1, FAR))])
    asked: list[int] = []

    def look(image: np.ndarray, scale: float, min_score: float, max_boxes: int) -> sv.Detections:
        asked.append(max_boxes)
        return next(looks)

    detector = load(path, scales=(1.0, 2.0))
    monkeypatch.setattr(detector, "_look", look)
    best = detector.detect(np.zeros((64, 64, 3), np.uint8), 0, 3)
    assert as_list(best) == [(0.45, 1, FAR), (0.25, 0, A), (0.2, 1, A)]
    assert asked == [3, 3]
