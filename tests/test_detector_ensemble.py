"""Several detectors on the same image: what they find is joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
import torch
from segmented import detector_file

from pipeline.errors import UserError
from pipeline.models import detector_ensemble
from pipeline.models.detector_ensemble import joined


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


def test_what_all_have_found_comes_before_what_one_is_sure_of() -> None:
    one = found((0.5, 0, A), (0.8, 1, FAR))
    two = found((0.6, 0, NEAR_A))
    assert as_list(joined([one, two])) == [(0.55, 0, NEAR_A), (0.4, 1, FAR)]


def test_classes_stay_apart() -> None:
    assert as_list(joined([found((0.5, 0, A)), found((0.6, 1, NEAR_A))])) == [
        (0.3, 1, NEAR_A),
        (0.25, 0, A),
    ]


def test_each_detector_counts_once() -> None:
    """Of two boxes of one detector that say the same, the better counts."""
    one = found((0.9, 0, A), (0.3, 0, NEAR_A))
    assert as_list(joined([one, found((0.1, 0, A))])) == [(0.5, 0, A)]


def test_one_detector_alone_is_left_as_it_is() -> None:
    boxes = found((0.9, 0, A), (0.3, 0, NEAR_A))
    assert as_list(joined([boxes])) == as_list(boxes)


def test_nothing_found() -> None:
    assert len(joined([found(), found()])) == 0
    assert as_list(joined([found(), found((0.5, 0, A))])) == [(0.25, 0, A)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three detectors: of scratch and stain, of stain and scratch, and of others."""
    folder = tmp_path_factory.mktemp("detectors")
    for k, classes in enumerate((("scratch", "stain"), ("stain", "scratch"), ("scratch", "dent"))):
        detector_file(folder, *classes, seed=k)
    return folder


def load(folder: Path, *numbers: int, **changes: Any) -> detector_ensemble.DetectorEnsemble:
    paths = [str(folder / f"world{k}.safetensors") for k in numbers]
    views: dict[str, Any] = {"scales": (1.0,), "flip": False, **changes}
    return detector_ensemble.load(paths, None, torch.device("cpu"), offline=True, **views)


def test_classes_go_by_name(folder: Path) -> None:
    """Each detector orders them as it likes."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    alone = {k: as_list(load(folder, k).detect(image, 0, 300)) for k in (0, 1)}
    both = load(folder, 0, 1)
    assert both.classes == ("scratch", "stain")
    together = as_list(both.detect(image, 0, 300))
    named = {0: alone[0], 1: [(score, 1 - cls, box) for score, cls, box in alone[1]]}
    known = {(cls, box) for its in named.values() for _, cls, box in its}
    assert together and {(cls, box) for _, cls, box in together} <= known
    scores = [score for score, *_ in together]
    assert scores == sorted(scores, reverse=True)


def test_mirror_image_is_a_second_look(folder: Path) -> None:
    """What is found there comes back to where it is; an image and its mirror image agree."""
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    mirror = np.ascontiguousarray(image[:, ::-1])
    looking = load(folder, 0, flip=True)
    found, mirrored = (as_list(looking.detect(its, 0, 300)) for its in (image, mirror))
    assert found and len(found) == len(mirrored)
    back = [(score, cls, (96 - x2, y1, 96 - x1, y2)) for score, cls, (x1, y1, x2, y2) in mirrored]
    for (score, cls, box), (s, c, b) in zip(sorted(found), sorted(back), strict=True):
        assert (score, cls) == (pytest.approx(s, abs=1e-4), c)
        assert np.abs(np.subtract(box, b)).max() <= 1  # both are cut to whole pixels
    assert found != as_list(load(folder, 0).detect(image, 0, 300))


def test_scales_are_parts_of_the_size_it_was_trained_with(folder: Path) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    twice = load(folder, 0, scales=(2.0,)).detect(image, 0, 300)
    paths = [str(folder / "world0.safetensors")]
    options: dict[str, Any] = {"scales": (1.0,), "flip": False, "offline": True}
    larger = detector_ensemble.load(paths, 128, torch.device("cpu"), **options)
    assert as_list(twice) == as_list(larger.detect(image, 0, 300))
    both = load(folder, 0, scales=(1.0, 2.0)).detect(image, 0, 300)
    assert as_list(both) not in (as_list(twice), as_list(load(folder, 0).detect(image, 0, 300)))


def test_most_boxes(folder: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(load(folder, 0, 1).detect(image, 0, 3)) <= 3


def test_detectors_of_other_classes_are_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--boxes: .* scratch, stain, found .*2.safetensors of sc"
    ):
        load(folder, 0, 2)
