"""`pipeline segment`: sources and boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rectangles import CLASSES, draw, filled
from segmented import (
    HEIGHT,
    WIDTH,
    Entry,
    boxes_file,
    brief,
    detector_file,
    entry,
    fill_boxes,
    run,
    write_images_and_truth,
)

from pipeline import cli
from pipeline.config import SegmentConfig
from pipeline.data import predictions
from pipeline.data.files import decode, read_image, read_json
from pipeline.data.writers import create
from pipeline.errors import UserError
from pipeline.stages import segment


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_truth(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def box_filler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fill_boxes(monkeypatch)


# ---- The whole of it -------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["boxes", "points", "boxes+points"])
def test_results_are_coco_results(dataset: Path, tmp_path: Path, sam: str, prompt: str) -> None:
    """With a real network: as pycocotools reads them, of the dataset's size, id and category."""
    results = run(dataset, tmp_path / "out", sam=sam, prompt=prompt)
    truth = COCO(str(dataset / "annotations" / "instances.json"))
    loaded = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(loaded.anns) == len(results) == 4
    for result in results:
        assert result["segmentation"]["size"] == [HEIGHT, WIDTH]
        assert 0 <= result["quality"] <= 1
        own = [a for a in truth.anns.values() if a["image_id"] == result["image_id"]]
        assert (result["category_id"], result["bbox"]) in [
            (a["category_id"], a["bbox"]) for a in own
        ]


def test_the_command(
    dataset: Path, tmp_path: Path, sam: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--source", str(dataset), "--boxes", "truth", "--sam", sam, "--out", str(out)]
    cli.main(["segment", "--prompt", "boxes", *options, "--splits", "test", "--device", "cpu"])
    assert f"3 instances in 3 images: {out}" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "predictions.json", "images.json", "config.yaml", "run.json",
    }  # fmt: skip
    record = read_json(out / "run.json")
    assert record["command"] == "segment"
    assert set(record["inputs"]) == {"source", "sam"}
    images = read_json(out / "images.json")
    assert [image["id"] for image in images["images"]] == [3, 4, 5]
    size = {"width": WIDTH, "height": HEIGHT}
    assert images["images"][1] == {"id": 4, "file_name": "good__003.png", **size}
    assert images["categories"] == [{"id": 1, "name": "scratch"}, {"id": 2, "name": "stain"}]


# ---- Boxes -----------------------------------------------------------------------------------


def test_boxes_from_the_truth(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    results = run(dataset, tmp_path / "out", prompt="boxes+points")
    assert brief(results) == [
        (1, "scratch", [10, 12, 30, 18], 1),
        (3, "stain", [50, 40, 40, 24], 1),
        (3, "scratch", [2, 2, 28, 18], 1),
        (5, "stain", [8, 40, 22, 26], 1),
    ]
    assert [e["quality"] for e in results] == [0.5] * 4
    for e in results:  # run lengths decoded by pycocotools: the true rectangles
        x, y, w, h = map(int, e["bbox"])
        decoded = coco_mask.decode(e["segmentation"])
        np.testing.assert_array_equal(decoded, filled((x, y, x + w, y + h), HEIGHT, WIDTH))
    assert box_filler == ["boxes+points"] * 5


def test_boxes_from_a_file(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    """Under the least score and beyond the most boxes they go; the best come first."""
    entries = [
        entry(3, 1, (1, 1, 9, 9), 0.3),
        entry(3, 2, (2, 2, 9, 9), 0.8),
        entry(3, 2, (3, 3, 9, 9), 0.5),
        entry(3, 1, (4, 4, 9, 9), 0.19),
        entry(5, 1, (5, 5, 9, 9), 0.2),
        entry(77, 1, (6, 6, 9, 9), 0.9),  # an image of another split
    ]
    path = boxes_file(tmp_path / "boxes", entries)
    results = run(dataset, tmp_path / "a", path, min_score=0.2)
    assert brief(results) == [
        (3, "stain", [2, 2, 7, 7], 0.8),
        (3, "stain", [3, 3, 6, 6], 0.5),
        (3, "scratch", [1, 1, 8, 8], 0.3),
        (5, "scratch", [5, 5, 4, 4], 0.2),
    ]
    results = run(dataset, tmp_path / "b", path, min_score=0.2, max_boxes=1)
    assert brief(results) == [
        (3, "stain", [2, 2, 7, 7], 0.8),
        (5, "scratch", [5, 5, 4, 4], 0.2),
    ]


def test_masks_of_the_boxes_file_are_replaced(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    """One command's output is another's input."""
    first = run(dataset, tmp_path / "a", splits=("test",))
    stale = [{**e, "segmentation": "stale", "quality": 0.1} for e in first]
    path = boxes_file(tmp_path / "boxes", stale)
    assert run(dataset, tmp_path / "b", path, splits=("test",)) == first


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"category_id": 3}, "expected category ids up to 2, found 3"),
        ({"category_id": 0}, "entry 1: category_id: expected a whole number above 0, found 0"),
        ({"category_id": "stain"}, "entry 1: category_id: expected a whole number above 0"),
        ({"image_id": "a.png"}, "entry 1: image_id: expected a whole number, found 'a.png'"),
        ({"bbox": [1, 2, 3]}, "entry 1: bbox: expected x, y, width and height in pixels"),
        ({"bbox": [1, 2, -3, 4]}, "entry 1: bbox: expected x, y, width and height in pixels"),
        ({"bbox": [1, 2, float("nan"), 4]}, "entry 1: bbox: expected x, y, width and height"),
        ({"score": None}, "entry 1: score: expected a number of 0 to 1, found None"),
    ],
)
def test_a_bad_boxes_file_exits_with_2(
    dataset: Path,
    tmp_path: Path,
    box_filler: list[str],
    capsys: pytest.CaptureFixture[str],
    change: Entry,
    problem: str,
) -> None:
    entries = [entry(3, 1, (1, 1, 9, 9), 0.3), {**entry(3, 2, (2, 2, 9, 9), 0.8), **change}]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    options = ["--source", str(dataset), "--boxes", str(path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", *options])
    assert stopped.value.code == 2
    assert f"pipeline segment: {path}: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "expected a list of COCO results, found dict"),
        ('[{"image_id": 1}]', "entry 0: expected bbox, category_id, score, found none"),
        ("[3]", "entry 0: expected bbox, category_id, image_id, score, found none"),
        ("[", "expected a JSON file, found"),
    ],
)
def test_other_json_as_boxes(dataset: Path, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(UserError, match=f"boxes.json: {problem}"):
        run(dataset, tmp_path / "out", tmp_path / "boxes.json")


def test_truth_needs_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"^--boxes truth: expected a dataset, found"):
        run(tmp_path / "images", tmp_path / "out")


# ---- Boxes of a detector ---------------------------------------------------------------------


@pytest.mark.parametrize("rescore", [True, False])
@pytest.mark.parametrize("classes", [("scratch", "stain"), ("stain", "scratch")])
def test_boxes_of_a_detector(
    dataset: Path,
    tmp_path: Path,
    box_filler: list[str],
    classes: tuple[str, str],
    rescore: bool,
) -> None:
    """The detector's classes, which it may order otherwise than the dataset, go by name.

    Its scores are multiplied by the quality of the masks, here 0.5, unless that is switched off.
    """
    from pipeline.models import yolo_world

    path = str(detector_file(tmp_path, *classes))
    options: dict[str, Any] = {"min_score": 0, "max_boxes": 60, "splits": ("test",)}
    options |= {"scales": 1, "flip": False}
    results = run(dataset, tmp_path / "out", path, fit_boxes=False, rescore=rescore, **options)
    alone = yolo_world.Detector(yolo_world.load_model(path), None, torch.device("cpu"))
    expected = []
    for image_id, name in ((3, "stain__002.png"), (4, "good__003.png"), (5, "stain__004.png")):
        found = alone.detect(read_image(dataset / "images" / name), 0, 60)
        assert found.class_id is not None and found.confidence is not None
        for box, index, score in zip(found.xyxy, found.class_id, found.confidence, strict=True):
            expected.append((image_id, classes[index], box, score))
    assert len(results) == len(expected) > 10
    for result, (image_id, name, box, score) in zip(results, expected, strict=True):
        assert (result["image_id"], CLASSES[result["category_id"] - 1]) == (image_id, name)
        assert result["score"] == pytest.approx(score * (0.5 if rescore else 1), abs=1e-5)
        x, y, w, h = result["bbox"]
        np.testing.assert_allclose([x, y, x + w, y + h], box, atol=0.02)


@pytest.mark.parametrize("boxes", ["detector.pt", "results.json", "truth"])
def test_quality_changes_the_order_of_what_a_detector_finds(tmp_path: Path, boxes: str) -> None:
    config = SegmentConfig(source=tmp_path, out=tmp_path / "out", boxes=boxes)
    found = sv.Detections(
        xyxy=np.array([[0, 0, 9, 9], [5, 5, 20, 20], [1, 1, 3, 3]]),
        class_id=np.array([0, 1, 0]),
        confidence=np.array([0.8, 0.6, 0.1]),
        data={"quality": np.array([0.25, 0.9, 0.5])},
    )
    after = segment._rescored(found, config)
    detected = boxes == "detector.pt"
    assert after.confidence == pytest.approx([0.54, 0.2, 0.05] if detected else [0.8, 0.6, 0.1])
    assert after.xyxy[:, 0].tolist() == ([5, 0, 1] if detected else [0, 5, 1])
    assert after.data["quality"].tolist() == ([0.9, 0.25, 0.5] if detected else [0.25, 0.9, 0.5])


def test_a_detector_of_other_classes(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    path = detector_file(tmp_path, "scratch", "dent")
    with pytest.raises(UserError, match="expected a detector of scratch, stain, found one of"):
        run(dataset, tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fit", "expected"), [(True, [3, 4, 9, 9]), (False, [3.5, 4.25, 8.75, 9.5])]
)
def test_boxes_are_fitted_to_their_masks(
    dataset: Path, tmp_path: Path, box_filler: list[str], fit: bool, expected: list[float]
) -> None:
    """Here a mask is its box without the fractions; the box of the file is not a whole number."""
    given = [{"image_id": 3, "category_id": 1, "bbox": [3.5, 4.25, 8.75, 9.5], "score": 0.5}]
    path = boxes_file(tmp_path / "given", given)
    results = run(dataset, tmp_path / "out", path, fit_boxes=fit)
    assert [e["bbox"] for e in results] == [expected]


# ---- Sources ---------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path: Path, box_filler: list[str]) -> None:
    """Of any size and kind, numbered by name; the classes are those of the detector."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, height, width in (("b.png", 40, 60), ("a.jpg", 50, 30), ("c.bmp", 31, 77)):
        cv2.imwrite(str(folder / name), draw([], height, width))
    run(
        folder,
        tmp_path / "out",
        detector_file(tmp_path, "one", "two", "three"),
        min_score=0,
        max_boxes=2,
    )
    images = read_json(tmp_path / "out" / "images.json")
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in images["images"]] == [
        (1, "a.jpg", 50, 30),
        (2, "b.png", 40, 60),
        (3, "c.bmp", 31, 77),
    ]
    assert [c["name"] for c in images["categories"]] == ["one", "two", "three"]
    coco = COCO(str(tmp_path / "out" / "images.json"))
    assert len(coco.loadRes(str(tmp_path / "out" / "predictions.json")).anns) == 6


def test_a_folder_with_boxes_from_a_file_takes_the_classes_beside_it(
    tmp_path: Path, box_filler: list[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), draw([], 40, 60))
    path = boxes_file(tmp_path / "boxes", [entry(1, 3, (1, 2, 9, 9), 0.7)], ("x", "y", "z"))
    (result,) = run(folder, tmp_path / "out", path)
    assert result["category_id"] == 3
    classes, _ = predictions.read_images(tmp_path / "out")
    assert classes == ("x", "y", "z")
    (tmp_path / "boxes" / "images.json").unlink()
    with pytest.raises(UserError, match=r"images.json: expected a JSON file, found nothing there"):
        run(folder, tmp_path / "other", path)


def test_a_video(tmp_path: Path, box_filler: list[str]) -> None:
    """Each frame has its own id, name and mask, also when the file's name has a dot in it."""
    video = tmp_path / "cam.1.mp4"
    with create(video, Fraction(10)) as writer:
        for i in range(3):
            writer.write(draw([("stain", (10 + i, 10, 40, 30))], 48, 64))
    path = boxes_file(tmp_path / "boxes", [entry(i, 2, (i, 1, 20, 20), 0.9) for i in (1, 2, 3)])
    results = run(video, tmp_path / "out", path, masks=True)
    assert [e["image_id"] for e in results] == [1, 2, 3]
    names = [f"cam.1_{i:06d}" for i in range(3)]
    _, images = predictions.read_images(tmp_path / "out")
    assert [image["file_name"] for image in images] == names
    for i, name in enumerate(names, start=1):
        labels = decode(tmp_path / "out" / "masks" / f"{name}.png", cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(labels, 2 * filled((i, 1, 20, 20), 48, 64))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "nothing there"),
        (lambda path: path.mkdir(), "expected a folder of images, found none in it"),
        (lambda path: path.write_bytes(b"no video"), "expected a video"),
    ],
)
def test_a_source_without_pictures(
    tmp_path: Path, box_filler: list[str], make: Callable[[Path], Any], problem: str
) -> None:
    """It is seen before the output folder is touched."""
    make(tmp_path / "source")
    path = boxes_file(tmp_path / "boxes", [])
    with pytest.raises(UserError, match=problem):
        run(tmp_path / "source", tmp_path / "out", path)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_missing_split_keeps_what_is_there(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    run(dataset, tmp_path / "out")
    with pytest.raises(UserError, match=r"fold3_val.json: expected this split"):
        run(dataset, tmp_path / "out", boxes_file(tmp_path / "b", []), fold=3, force=True)
    assert (tmp_path / "out" / "run.json").exists()
