"""`pipeline segment`: sources, boxes, masks and what is written."""

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
from rectangles import CLASSES, Defects, draw, filled, write_dataset

from pipeline import cli, record
from pipeline.config import (
    DetectAnomalyConfig,
    EvaluateConfig,
    OverlayConfig,
    SegmentConfig,
    build,
)
from pipeline.data import heatmaps, predictions
from pipeline.data.files import decode, read_image, read_json, write_json
from pipeline.data.masks import decode_rle, encode_rle
from pipeline.data.writers import create
from pipeline.errors import UserError
from pipeline.stages import detect_anomaly, evaluate, overlay, segment

# Images 1 and 2 are the val split; 3 to 5 the test split.
VAL: tuple[Defects, ...] = ([("scratch", (10, 12, 40, 30))], [])
TEST: tuple[Defects, ...] = (
    [("stain", (50, 40, 90, 64)), ("scratch", (2, 2, 30, 20))],
    [],
    [("stain", (8, 40, 30, 66))],
)
HEIGHT, WIDTH = 72, 96
Entry = dict[str, Any]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": VAL[:0], "val": VAL, "test": TEST}
    return write_dataset(tmp_path_factory.mktemp("data") / "d", splits)


@pytest.fixture
def shown() -> list[tuple[Any, Any]]:
    """The masks and points that `box_filler` was given, one pair per image."""
    return []


@pytest.fixture
def box_filler(monkeypatch: pytest.MonkeyPatch, shown: list[tuple[Any, Any]]) -> list[str]:
    """In place of a SAM: each box, filled. Gives the prompts it was asked with, one per image."""
    prompts: list[str] = []

    class BoxFiller:
        @classmethod
        def load(cls, source: str, **options: object) -> BoxFiller:
            return cls()

        def segment(self, image: np.ndarray, found: sv.Detections, prompt: str) -> sv.Detections:
            prompts.append(prompt)
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


def boxes_file(folder: Path, entries: list[Entry], classes: tuple[str, ...] = CLASSES) -> Path:
    predictions.write_predictions(folder, entries, [], classes)
    return folder / "predictions.json"


def brief(results: list[Entry]) -> list[tuple[int, str, list[float], float]]:
    return [(e["image_id"], CLASSES[e["category_id"] - 1], e["bbox"], e["score"]) for e in results]


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
        ({"score": None}, "entry 1: score: expected a number, found None"),
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


def rle(box: tuple[int, int, int, int], height: int = HEIGHT, width: int = WIDTH) -> Entry:
    return encode_rle(filled(box, height, width))


@pytest.mark.parametrize("prompt", ["boxes", "points", "boxes+points", "masks", "boxes+masks"])
def test_the_prompt_takes_points_and_masks_of_the_boxes_file(
    dataset: Path, tmp_path: Path, box_filler: list[str], shown: list[Any], prompt: str
) -> None:
    """And leaves alone what it does not ask for: that may be anything."""
    points = {"points": [[3, 4, 1], [40.5, 50, 0]]} if "points" in prompt else {"points": "x"}
    seen = {"segmentation": rle((1, 1, 9, 9))} if "masks" in prompt else {"segmentation": "x"}
    other = {"segmentation": rle((2, 2, 5, 8))} if "masks" in prompt else {}
    entries = [
        {**entry(3, 1, (1, 1, 9, 9), 0.3), **seen, **points},
        {**entry(3, 2, (2, 2, 9, 9), 0.8), **other},
    ]
    path = boxes_file(tmp_path / "boxes", entries)
    run(dataset, tmp_path / "out", path, prompt=prompt, splits=("test",))
    assert box_filler == [prompt] * 3
    masks, given = shown[0]  # the better one comes first
    if "points" in prompt:
        assert [own.tolist() for own in given] == [[], points["points"]]
        assert given[0].shape == (0, 3)
    else:
        assert given is None
    if "masks" in prompt:
        boxes = ((2, 2, 5, 8), (1, 1, 9, 9))
        np.testing.assert_array_equal(masks, [filled(box, HEIGHT, WIDTH) for box in boxes])
    else:
        assert masks is None
    assert all(len(masks or ()) == 0 for masks, _ in shown[1:])


@pytest.mark.parametrize("prompt", ["masks", "boxes+masks"])
def test_a_second_pass_starts_from_the_first_ones_masks(
    dataset: Path, tmp_path: Path, sam: str, prompt: str
) -> None:
    """With a real network: the first pass's results are input as they are, and they count."""
    first = run(dataset, tmp_path / "first", sam=sam)
    again = run(dataset, tmp_path / "again", tmp_path / "first/predictions.json", sam=sam,
                prompt=prompt)  # fmt: skip
    assert brief(again) == brief(first)
    emptied = [{**e, "segmentation": rle((0, 0, 0, 0))} for e in first]
    path = boxes_file(tmp_path / "boxes", emptied)
    empty = run(dataset, tmp_path / "empty", path, sam=sam, prompt=prompt)
    for one, other in zip(again, empty, strict=True):
        assert one["segmentation"] != other["segmentation"]


OTHER_SIZE = rle((1, 1, 9, 9), WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("prompt", "change", "problem"),
    [
        ("masks", {}, "entry 1: expected segmentation, found none"),
        ("boxes+masks", {}, "entry 1: expected segmentation, found none"),
        ("masks", {"segmentation": None}, "entry 1: segmentation: expected COCO's compressed run"),
        ("masks", {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "entry 1: segmentation: expected COCO's"),
        ("masks", {"segmentation": OTHER_SIZE}, "image 3, bbox [2, 2, 7, 7]: segmentation: "
         "expected run lengths of a mask of 72 rows and 96 columns, found {"),
        ("masks", {"segmentation": {"size": [72, 96], "counts": "12"}}, "image 3, bbox [2, 2, 7, "),
        ("points", {"points": []}, "entry 1: points: expected a list of [x, y, label] with label"),
        ("points", {"points": None}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [1, 2, 1]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2, 3]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2, -1]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("boxes+points", {"points": [[float("nan"), 2, 1]]}, "entry 1: points: expected a list"),
        ("boxes+points", {"points": [[1, float("inf"), 1]]}, "entry 1: points: expected a list"),
        ("points", {"points": [[1, 2, 1], [96, 2, 1]]}, "image 3, bbox [2, 2, 7, 7]: points: "
         "expected points in an image of 96 x 72 pixels, found [96, 2, 1]"),
        ("points", {"points": [[1, -0.5, 1]]}, "image 3, bbox [2, 2, 7, 7]: points: expected"),
    ],
)  # fmt: skip
def test_bad_points_and_masks_exit_with_2_and_lose_nothing(
    dataset: Path,
    tmp_path: Path,
    box_filler: list[str],
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    change: Entry,
    problem: str,
) -> None:
    out = tmp_path / "out"
    before = run(dataset, out)
    good = {"segmentation": rle((1, 1, 9, 9)), "points": [[95.5, 71.5, 0]]}
    entries = [
        {**entry(3, 1, (1, 1, 9, 9), 0.3), **good},
        {**entry(3, 2, (2, 2, 9, 9), 0.8), **change},
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    options = ["--source", str(dataset), "--boxes", str(path), "--out", str(out), "--force"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", *options, "--prompt", prompt])
    assert stopped.value.code == 2
    assert f"pipeline segment: {path}: {problem}" in capsys.readouterr().err
    assert read_json(out / "predictions.json") == before
    assert (out / "run.json").is_file()


def test_masks_of_images_of_another_size(tmp_path: Path, box_filler: list[str]) -> None:
    """Where only the image itself tells its size."""
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), draw([], 40, 60))
    entries = [{**entry(1, 1, (1, 1, 9, 9), 0.3), "segmentation": rle((1, 1, 9, 9))}]
    path = boxes_file(tmp_path / "boxes", entries)
    with pytest.raises(UserError, match=r"image 1, .* expected run lengths of a mask of 40 rows"):
        run(folder, tmp_path / "out", path, prompt="masks")
    assert not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize("boxes", ["truth", "best.pt"])
def test_masks_need_a_boxes_file(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], boxes: str
) -> None:
    options = ["--source", str(dataset), "--boxes", boxes, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", *options, "--prompt", "boxes+masks"])
    assert stopped.value.code == 2
    problem = "--prompt: expected boxes of a COCO results file for masks, found 'boxes+masks'"
    assert problem in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes a YOLO-World-n with random weights for some classes."""
    from pipeline.models import yolo_world

    torch.manual_seed(0)
    model = yolo_world.load_model("yolov8n-worldv2.yaml")

    def write(*classes: str) -> str:
        path = tmp_path_factory.mktemp("detector") / "world.safetensors"
        yolo_world.set_prompts(model, classes, None)
        yolo_world.save_safetensors(yolo_world.plain(model), path, image_size=64)
        return str(path)

    return write


@pytest.mark.parametrize("rescore", [True, False])
@pytest.mark.parametrize("classes", [("scratch", "stain"), ("stain", "scratch")])
def test_boxes_of_a_detector(
    dataset: Path,
    tmp_path: Path,
    box_filler: list[str],
    detector: Callable[..., str],
    classes: tuple[str, str],
    rescore: bool,
) -> None:
    """The detector's classes, which it may order otherwise than the dataset, go by name.

    Its scores are multiplied by the quality of the masks, here 0.5, unless that is switched off.
    """
    from pipeline.models import yolo_world

    path = detector(*classes)
    options: dict[str, Any] = {"min_score": 0, "max_boxes": 60, "splits": ("test",)}
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


def test_a_detector_of_other_classes(
    dataset: Path, tmp_path: Path, box_filler: list[str], detector: Callable[..., str]
) -> None:
    path = detector("scratch", "dent")
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


def test_a_folder_of_images(
    tmp_path: Path, box_filler: list[str], detector: Callable[..., str]
) -> None:
    """Of any size and kind, numbered by name; the classes are those of the detector."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, height, width in (("b.png", 40, 60), ("a.jpg", 50, 30), ("c.bmp", 31, 77)):
        cv2.imwrite(str(folder / name), draw([], height, width))
    run(folder, tmp_path / "out", detector("one", "two", "three"), min_score=0, max_boxes=2)
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


# ---- Output ----------------------------------------------------------------------------------


def test_mask_pngs_are_label_maps(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    """Pixels are category ids, and of two that overlap the one with the higher score wins."""
    over, under = (10, 10, 40, 40), (30, 20, 70, 60)
    entries = [entry(3, 2, over, 0.9), entry(3, 1, under, 0.4)]
    run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", entries), masks=True)
    names = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert names == {path.name for path in (dataset / "images").iterdir()}
    labels = decode(tmp_path / "out" / "masks" / "stain__002.png", cv2.IMREAD_UNCHANGED)
    expected = np.where(filled(under, HEIGHT, WIDTH), 1, 0)
    expected[filled(over, HEIGHT, WIDTH)] = 2
    np.testing.assert_array_equal(labels, expected)
    empty = decode(tmp_path / "out" / "masks" / "good__003.png", cv2.IMREAD_UNCHANGED)
    assert empty.shape == (HEIGHT, WIDTH) and not empty.any()


def test_equal_scores_in_a_mask_png(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    """The earlier one wins, as in `--overlaps resolve`."""
    box = (10, 10, 40, 40)
    entries = [entry(3, 2, box, 0.5), entry(3, 1, box, 0.5)]
    run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", entries), masks=True)
    labels = decode(tmp_path / "out" / "masks" / "stain__002.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, 2 * filled(box, HEIGHT, WIDTH))


def test_overlaps_are_resolved_within_a_class_when_asked(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    """A mask that is left empty stays in the results, and every stage takes it."""
    over, under, inside, other = (
        (10, 10, 40, 40),
        (30, 20, 70, 60),
        (32, 22, 38, 38),
        (5, 5, 60, 50),
    )
    entries = [
        entry(3, 2, over, 0.9), entry(3, 2, under, 0.8), entry(3, 2, inside, 0.7),
        entry(3, 1, other, 0.6),
    ]  # fmt: skip
    path = boxes_file(tmp_path / "boxes", entries)
    kept = run(dataset, tmp_path / "kept", path)
    full = [filled(box, HEIGHT, WIDTH) for box in (over, under, inside, other)]
    for result, mask in zip(kept, full, strict=True):
        np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)
    resolved = run(dataset, tmp_path / "resolved", path, overlaps="resolve", masks=True)
    expected = [full[0], full[1] & ~full[0], np.zeros((HEIGHT, WIDTH), bool), full[3]]
    for result, mask in zip(resolved, expected, strict=True):
        np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)
    assert brief(resolved) == brief(kept)
    values: Entry = {"predictions": tmp_path / "resolved"}
    evaluate.run(build(EvaluateConfig, values | {"data": dataset, "out": tmp_path / "evaluation"}))
    overlay.run(build(OverlayConfig, values | {"source": dataset, "out": tmp_path / "a.mp4"}))


def test_islands_and_holes_go_when_asked(
    dataset: Path, tmp_path: Path, box_filler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before overlaps are resolved, so that afterwards there are none."""
    square, hole, speck = (
        filled(box, HEIGHT, WIDTH) for box in ((10, 10, 40, 40), (20, 20, 23, 23), (60, 60, 63, 63))
    )
    rough = (square & ~hole) | speck

    class Rough:
        @classmethod
        def load(cls, source: str, **options: object) -> Rough:
            return cls()

        def segment(self, image: np.ndarray, found: sv.Detections, prompt: str) -> sv.Detections:
            found.mask = np.stack([rough, hole]) if len(found) else None
            found.data["quality"] = np.full(len(found), 0.5, np.float32)
            return found

    monkeypatch.setattr(segment, "Segmenter", Rough)
    entries = [entry(3, 2, (10, 10, 64, 64), 0.9), entry(3, 2, (20, 20, 23, 23), 0.8)]
    path = boxes_file(tmp_path / "boxes", entries)
    for below, expected in ((0, [rough, hole]), (9, [rough, hole]), (10, [square, hole & ~square])):
        options: Entry = {"clean_below": below, "overlaps": "resolve"}
        found = run(dataset, tmp_path / str(below), path, **options)
        for result, mask in zip(found, expected, strict=True):
            np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)


def test_masks_of_images_that_differ_in_their_suffix(tmp_path: Path, box_filler: list[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.bmp", "a.jpg", "a.png"):
        cv2.imwrite(str(folder / name), draw([], 40, 60))
    run(folder, tmp_path / "out", boxes_file(tmp_path / "boxes", []), masks=True)
    names = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert names == ["a.bmp.png", "a.jpg.png", "a.png"]


def test_no_boxes_at_all(dataset: Path, tmp_path: Path, sam: str) -> None:
    """Defined, and no work for the network."""
    results = run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", []), sam=sam)
    assert results == []
    assert len(predictions.read_images(tmp_path / "out")[1]) == 5
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_finished_result_is_replaced_only_by_force(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    out = tmp_path / "out"
    before = run(dataset, out, masks=True)
    with pytest.raises(UserError, match="holds a finished result; give --force"):
        run(dataset, out, splits=("test",))
    assert read_json(out / "predictions.json") == before
    after = run(dataset, out, splits=("test",), masks=True, force=True)
    assert {e["image_id"] for e in after} == {3, 5}
    assert len(list((out / "masks").iterdir())) == 3  # none of the earlier run
    run(dataset, out, force=True)
    assert not (out / "masks").exists()


def test_a_foreign_folder_is_refused(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="found other files in"):
            run(dataset, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_run_can_be_repeated(
    dataset: Path, tmp_path: Path, box_filler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "write_predictions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dataset, tmp_path / "out", masks=True)
    assert not (tmp_path / "out" / "run.json").exists()
    assert len(run(dataset, tmp_path / "out", masks=True)) == 4


# ---- predictions.json ------------------------------------------------------------------------


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


# ---- Anomaly scores beside the boxes ---------------------------------------------------------

ANOMALY: dict[str, tuple[Defects, ...]] = {
    "train": ([], [], [], [], [("scratch", (10, 12, 40, 30))]),
    "val": VAL,
    "test": TEST,
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and the run of an anomaly detector on it."""
    root = tmp_path_factory.mktemp("anomaly")
    data = write_dataset(root / "d", ANOMALY)
    options = {"image_size": 64, "coreset": 0.2, "device": "cpu"}
    values = {"source": data, "out": root / "run", **options}
    detect_anomaly.run(build(DetectAnomalyConfig, values))
    return data, root / "run"


def test_an_anomaly_detector_looks_at_the_same_images(
    known: tuple[Path, Path], tmp_path: Path, box_filler: list[str]
) -> None:
    data, fitted = known
    results = boxes_file(tmp_path / "boxes", [entry(8, 2, (50, 40, 90, 64), 0.9)])
    run(data, tmp_path / "out", results, anomaly=fitted)
    threshold = read_json(fitted / "metrics.json")["image"]["threshold"]
    expected = {its.image_id: its for its in heatmaps.read_scores(fitted)}
    found = {its.image_id: its for its in heatmaps.read_scores(tmp_path / "out")}
    images = read_json(tmp_path / "out" / "images.json")["images"]
    assert found.keys() == expected.keys() == {image["id"] for image in images} == set(range(6, 11))
    for image in images:
        mine, its = found[image["id"]], expected[image["id"]]
        assert mine.score == pytest.approx(its.score, rel=1e-3)
        assert image["anomaly"] == {"score": mine.score, "threshold": threshold}
        assert (mine.split, mine.cls, mine.file_name) == (its.split, its.cls, its.file_name)
        np.testing.assert_allclose(mine.heat_map(), its.heat_map(), rtol=0.01)

    # Image 10 is a defect without a box: anomalous, no known class. Either way of telling agrees.
    def unknown(out: str, predictions: Path, **options: Any) -> Any:
        values = {"data": data, "predictions": predictions, "out": tmp_path / out, "resamples": 0}
        evaluate.run(build(EvaluateConfig, values | {"threshold": 0.5} | options))
        return read_json(tmp_path / out / "metrics.json")["unknown"]

    plain = run(data, tmp_path / "plain", results) and tmp_path / "plain"
    own, named = unknown("own", tmp_path / "out"), unknown("named", plain, anomaly=fitted)
    assert own.pop("threshold")["value"] == named.pop("threshold")["value"]
    assert own == named
    assert own["images_per_class"] == {"good": 0, "scratch": 0, "stain": 1}
    assert "10,stain__009.png,stain,unknown,miss" in (tmp_path / "own" / "images.csv").read_text()

    # Another run leaves nothing of this one.
    run(data, tmp_path / "out", results, force=True)
    assert not any("anomaly" in i for i in read_json(tmp_path / "out" / "images.json")["images"])
    assert not {"scores.json", "heatmaps"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_anomaly_scores_of_a_folder_of_images(
    known: tuple[Path, Path], tmp_path: Path, box_filler: list[str]
) -> None:
    data, fitted = known
    results = boxes_file(tmp_path / "boxes", [])
    run(data / "images", tmp_path / "out", results, anomaly=fitted, anomaly_threshold=-1)
    assert record.record_path(tmp_path / "out").is_file()
    scored = heatmaps.read_scores(tmp_path / "out")
    assert len(scored) == 10 and {(its.split, its.cls) for its in scored} == {(None, None)}
    images = read_json(tmp_path / "out" / "images.json")["images"]
    assert {image["anomaly"]["threshold"] for image in images} == {-1}


@pytest.mark.parametrize(
    ("made", "options", "problem"),
    [
        (
            {"image": {"threshold": None}},
            {},
            "--anomaly: expected a threshold in {}/metrics.json, ",
        ),
        (
            {"fold": 1},
            {},
            "--anomaly: expected a run of the dataset's single split, found one of the dataset's "
            "fold 1: {}",
        ),
        (
            {"protocol": "mvtec"},
            {"anomaly_threshold": 1.0},
            "--anomaly: expected a run of the dataset's single split, found one of an MVTec "
            "category, which may have learned images of the dataset's splits: {}",
        ),
        (None, {}, "{}/metrics.json: expected a JSON file, found nothing there"),
        ({"fold": None}, {}, "{}/model.safetensors: expected an anomaly detector of "),
    ],
)
def test_a_run_that_cannot_be_used(
    known: tuple[Path, Path],
    tmp_path: Path,
    box_filler: list[str],
    made: dict[str, Any] | None,
    options: dict[str, Any],
    problem: str,
) -> None:
    folder = tmp_path / "run"
    if made is not None:
        write_json(folder / "metrics.json", {**read_json(known[1] / "metrics.json"), **made})
    with pytest.raises(UserError) as raised:
        run(known[0], tmp_path / "out", anomaly=folder, **options)
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(problem.format(folder))
    assert not (tmp_path / "out").exists()


def test_an_anomaly_threshold_needs_a_run(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--anomaly-threshold: expected --anomaly beside it"):
        run(dataset, tmp_path / "out", anomaly_threshold=1.0)
