from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline import cli, record
from pipeline.config import EvaluateConfig, build
from pipeline.errors import UserError
from pipeline.stages.evaluate import run

CLASSES = ("bent_lead", "cut_lead", "damaged_case", "misplaced")
SIDE = 64

Box = tuple[int, int, int, int]  # x, y, width, height


def rle(box: Box) -> dict[str, Any]:
    """Run lengths of a filled box."""
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    found = coco_mask.encode(mask)
    return {"size": [SIDE, SIDE], "counts": found["counts"].decode()}


@dataclass
class World:
    """A dataset and the outputs of other stages, written by hand."""

    root: Path
    classes: Sequence[str] = CLASSES
    first_id: int = 1  # of the annotations
    splits: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, split: str, *truth: tuple[int, Box]) -> int:
        """Add an image with (category, box) instances, and return its id."""
        image_id = len(self.images) + 1
        cls = self.classes[truth[0][0] - 1] if truth else "good"
        image = {"id": image_id, "name": f"{cls}__{image_id:03}.png", "truth": truth}
        self.splits.setdefault(split, []).append(image)
        return image_id

    def add_again(self, split: str, image_id: int) -> None:
        """Put an image into another split as well: folds share them."""
        (image,) = (image for image in self.images if image["id"] == image_id)
        self.splits.setdefault(split, []).append(image)

    @property
    def images(self) -> list[dict[str, Any]]:
        every = [image for images in self.splits.values() for image in images]
        return list({image["id"]: image for image in every}.values())

    def write(self) -> Path:
        data = self.root / "data"
        everything = self.images
        for stem, images in {"instances": everything, **self.splits}.items():
            name = stem if stem == "instances" else f"instances_{stem}"
            self._json(data / "annotations" / f"{name}.json", self._coco(images))
        for image in everything:
            (data / "images").mkdir(exist_ok=True)
            cv2.imwrite(str(data / "images" / image["name"]), np.zeros((SIDE, SIDE, 3), np.uint8))
        return data

    def predict(
        self,
        folder: str,
        *entries: tuple[int, int, Box, float],
        masks: bool = True,
        quality: Sequence[float | None] = (),
    ) -> Path:
        """Write (image, category, box, score) as the output of `pipeline segment`."""
        results = [
            {"image_id": image, "category_id": category, "bbox": list(box), "score": score}
            | ({"segmentation": rle(box)} if masks else {})
            for image, category, box, score in entries
        ]
        for result, value in zip(results, quality, strict=False):
            result["quality"] = value
        self._json(self.root / folder / "predictions.json", results)
        coco = {**self._coco(self.images), "annotations": []}
        self._json(self.root / folder / "images.json", coco)
        return self.root / folder

    def truth_boxes(
        self, masks: bool = True, quality: Sequence[float] = (), folder: str = "truth_boxes"
    ) -> Path:
        entries = [
            (image["id"], category, box, 1.0)
            for image in self.images
            for category, box in image["truth"]
        ]
        return self.predict(folder, *entries, masks=masks, quality=quality)

    def classify(self, folder: str, name: str, decisions: dict[int, str]) -> Path:
        """Write certain decisions, with the classes in an order other than the dataset's."""
        names = [*reversed(self.classes), "good"]
        images = {str(i): [float(n == d) for n in names] for i, d in decisions.items()}
        content = {"name": name, "classes": names, "images": images}
        self._json(self.root / folder / "predictions.json", content)
        return self.root / folder

    def _coco(self, images: Sequence[dict[str, Any]]) -> dict[str, Any]:
        annotations: list[dict[str, Any]] = []
        for image in images:
            for category, box in image["truth"]:
                annotations.append(
                    {
                        "id": self.first_id + len(annotations),
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "segmentation": rle(box),
                        "iscrowd": 0,
                    }
                )
        return {
            "images": [
                {"id": i["id"], "file_name": i["name"], "width": SIDE, "height": SIDE}
                for i in images
            ],
            "annotations": annotations,
            "categories": [{"id": k, "name": n} for k, n in enumerate(self.classes, start=1)],
        }

    @staticmethod
    def _json(path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def evaluate(data: Path, predictions: Path, **options: Any) -> dict[str, Any]:
    out = data.parent / "out"
    options = {"resamples": 0, "threshold": 0.5, "force": True, **options}
    run(EvaluateConfig(data=data, predictions=predictions, out=out, **options))
    return json.loads((out / "metrics.json").read_text())


BOX = (10, 10, 20, 10)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Test split: images 1 to 4 with one defect of each class, 5 and 6 good."""
    world = World(tmp_path)
    for category in range(1, 5):
        world.add("test", (category, BOX))
    world.add("test")
    world.add("test")
    return world


def test_perfect_predictions_score_one(world: World) -> None:
    predictions = world.predict("found", *((i, i, BOX, 0.9) for i in range(1, 5)))
    metrics = evaluate(world.write(), predictions, truth_boxes=world.truth_boxes())
    for group in ("box", "mask"):
        assert metrics[group]["map50"] == metrics[group]["map50_95"] == 1
        assert metrics[group]["ap_per_class"] == dict.fromkeys(CLASSES, 1)
    mask = metrics["mask"]
    assert mask["mean_iou_matched"] == mask["mean_iou_all"] == 1
    assert mask["dice_matched"] == mask["dice_all"] == 1
    assert mask["pixel_iou_per_class"] == dict.fromkeys(CLASSES, 1)
    truth_boxes = {"mean_iou": 1, "dice": 1, "iou_per_class": dict.fromkeys(CLASSES, 1)}
    assert metrics["truth_boxes"] == truth_boxes
    assert metrics["missed"] == []
    assert metrics["good_images"]["false_alarms_per_image"] == 0
    detector = metrics["image_decision"]["detector"]
    assert (detector["accuracy"], detector["balanced_accuracy"], detector["macro_f1"]) == (1, 1, 1)
    assert metrics["verdicts"] == {
        "hit": 4, "miss": 0, "wrong class": 0, "false alarm": 0, "correct": 2,
    }  # fmt: skip


@pytest.mark.parametrize("first_id", [0, 1])
def test_annotation_ids_from_zero_do_not_cost_a_match(tmp_path: Path, first_id: int) -> None:
    world = World(tmp_path, classes=("scratch",), first_id=first_id)
    image = world.add("test", (1, BOX))
    metrics = evaluate(world.write(), world.predict("found", (image, 1, BOX, 0.9)))
    assert metrics["box"]["map50_95"] == metrics["mask"]["map50_95"] == 1


def test_figures_of_a_case_worked_out_by_hand(world: World) -> None:
    shifted = (14, 10, 20, 10)  # 16 of 24 columns in common: IoU 2/3, Dice 4/5
    predictions = world.predict(
        "found",
        (1, 1, BOX, 0.9),  # hit
        (2, 2, shifted, 0.8),  # hit
        (3, 4, BOX, 0.7),  # wrong class
        (4, 4, BOX, 0.4),  # under the threshold: missed
        (5, 1, BOX, 0.6),  # two false alarms on a good image
        (5, 2, (40, 40, 9, 9), 0.5),
    )
    metrics = evaluate(world.write(), predictions, truth_boxes=world.truth_boxes())

    # cut_lead is found at the IoU thresholds 0.50, 0.55, 0.60 and 0.65; misplaced behind one error
    assert metrics["box"]["ap50_per_class"] == {
        "bent_lead": 1, "cut_lead": 1, "damaged_case": 0, "misplaced": 0.5,
    }  # fmt: skip
    assert metrics["box"]["ap_per_class"] == {
        "bent_lead": 1, "cut_lead": 0.4, "damaged_case": 0, "misplaced": 0.5,
    }  # fmt: skip
    assert metrics["box"]["map50"] == 0.625
    assert metrics["box"]["map50_95"] == 0.475
    mask = metrics["mask"]
    assert mask["map50"] == 0.625
    assert mask["mean_iou_matched"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert mask["mean_iou_all"] == pytest.approx((1 + 2 / 3) / 4, abs=1e-6)
    assert mask["dice_matched"] == pytest.approx((1 + 4 / 5) / 2, abs=1e-6)
    assert mask["dice_all"] == pytest.approx((1 + 4 / 5) / 4, abs=1e-6)
    # pixels pooled over images: the false alarms count in the union
    assert mask["pixel_iou_per_class"] == {
        "bent_lead": pytest.approx(200 / 400),
        "cut_lead": pytest.approx(160 / (240 + 81), abs=1e-6),
        "damaged_case": 0,
        "misplaced": 0,
    }
    assert metrics["good_images"] == {
        "count": 2, "false_alarms": 2, "with_false_alarms": 1, "false_alarms_per_image": 1,
    }  # fmt: skip
    assert [(m["image_id"], m["class"]) for m in metrics["missed"]] == [
        (3, "damaged_case"), (4, "misplaced"),
    ]  # fmt: skip
    assert metrics["missed"][0]["bbox"] == list(BOX)
    assert metrics["errors"] == {
        "wrong_class": 1, "bad_box": 0, "both": 0, "duplicate": 0, "background": 2, "missed": 1,
    }  # fmt: skip
    # two good images allow no false alarm, so that only what is above 0.6 counts
    assert metrics["recall_at_false_alarms"] == {
        "recall": 0.5, "above_score": 0.6, "false_alarms": 0,
    }  # fmt: skip
    page = (world.root / "out" / "errors" / "index.html").read_text()
    assert "3 false alarms and 2 missed defects in\n6 images" in page
    assert page.count("<img") == 2 * 5
    report = (world.root / "out" / "report.md").read_text()
    assert "| boxes on no defect | 2 |" in report
    assert "| Recall at 1 false alarm per 100 good images | 0.500 |" in report
    detector = metrics["image_decision"]["detector"]
    assert detector["confusion"] == [
        [1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
    ]
    assert detector["accuracy"] == 0.5
    assert detector["balanced_accuracy"] == 0.5  # recalls 1/2, 1, 1, 0, 0
    assert detector["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 1 + 0 + 0) / 5, abs=1e-6)
    with (world.root / "out" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["verdict"], row["decision"], row["iou"]) for row in rows] == [
        ("hit", "bent_lead", "1.0000"),
        ("hit", "cut_lead", "0.6667"),
        ("wrong class", "misplaced", "0.0000"),
        ("miss", "good", "0.0000"),
        ("false alarm", "bent_lead", ""),
        ("correct", "good", ""),
    ]


def test_classifiers_stand_beside_the_detector_and_the_majority(world: World) -> None:
    right = {**dict(enumerate(CLASSES, start=1)), 5: "good", 6: "good"}
    a = world.classify("a", "resnet18", right)
    b = world.classify("b", "resnet18", {**right, 1: "cut_lead"})
    metrics = evaluate(world.write(), world.predict("found"), classifiers=(a, b))
    decisions = metrics["image_decision"]
    assert list(decisions) == ["detector", "resnet18", "resnet18 (b)", "majority"]
    assert decisions["resnet18"]["accuracy"] == 1
    assert decisions["resnet18 (b)"]["recall_per_class"] == {
        "good": 1, "bent_lead": 0, "cut_lead": 1, "damaged_case": 1, "misplaced": 1,
    }  # fmt: skip
    assert decisions["majority"]["class"] == "good"
    assert decisions["majority"]["accuracy"] == pytest.approx(2 / 6, abs=1e-6)
    assert decisions["majority"]["balanced_accuracy"] == 0.2
    assert decisions["majority"]["macro_f1"] == pytest.approx((2 * 2 / (2 + 6)) / 5, abs=1e-6)


def test_empty_predictions_are_zeros(world: World) -> None:
    metrics = evaluate(world.write(), world.predict("found"), resamples=20)
    assert metrics["box"]["map50"] == metrics["mask"]["map50_95"] == 0
    assert metrics["box"]["ap_per_class"] == dict.fromkeys(CLASSES, 0)
    assert metrics["mask"]["mean_iou_all"] == 0
    assert metrics["mask"]["mean_iou_matched"] is None
    assert len(metrics["missed"]) == 4
    assert metrics["intervals"]["box.map50"] == [0, 0]


def test_a_class_without_truth_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    image = world.add("test", (1, BOX))
    predictions = world.predict("found", (image, 1, BOX, 0.9), (image, 2, BOX, 0.8))
    metrics = evaluate(world.write(), predictions, resamples=20)
    nothing = dict.fromkeys(CLASSES[1:])
    for per_class in ("ap50_per_class", "ap_per_class"):
        assert metrics["box"][per_class] == {"bent_lead": 1, **nothing}
    assert metrics["mask"]["iou_per_class"] == {"bent_lead": 1, **nothing}
    assert metrics["mask"]["pixel_iou_per_class"] == {"bent_lead": 1, **nothing}
    assert metrics["box"]["map50"] == 1
    assert metrics["good_images"]["false_alarms_per_image"] is None
    assert metrics["recall_at_false_alarms"] is None
    assert metrics["intervals"]["box.ap50_per_class.bent_lead"] == [1, 1]
    assert metrics["image_decision"]["detector"]["balanced_accuracy"] == 1
    assert metrics["image_decision"]["detector"]["recall_per_class"]["good"] is None
    assert "good_images.false_alarms_per_image" not in metrics["intervals"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| pixel IoU | 1.000 | – | – | – |" in report


@pytest.mark.parametrize("alarms", [0, 3])
def test_a_split_of_good_images_alone(tmp_path: Path, alarms: int) -> None:
    world = World(tmp_path)
    images = [world.add("test") for _ in range(4)]
    predictions = world.predict("found", *((i, 1, BOX, 0.9) for i in images[:alarms]))
    metrics = evaluate(world.write(), predictions, resamples=20, truth_boxes=world.truth_boxes())
    assert metrics["box"]["map50"] is None
    assert metrics["mask"]["mean_iou_all"] is None
    assert metrics["truth_boxes"]["mean_iou"] is None
    assert metrics["good_images"]["false_alarms_per_image"] == alarms / 4
    assert metrics["recall_at_false_alarms"]["recall"] is None
    assert metrics["image_decision"]["detector"]["accuracy"] == 1 - alarms / 4
    assert metrics["image_decision"]["majority"]["accuracy"] == 1


def test_predictions_without_masks_give_no_mask_figures(world: World) -> None:
    predictions = world.predict("found", (1, 1, BOX, 0.9), masks=False)
    metrics = evaluate(world.write(), predictions)
    assert metrics["mask"] is None
    assert metrics["box"]["ap50_per_class"]["bent_lead"] == 1


def test_threshold_comes_from_the_val_split_alone(world: World) -> None:
    val = [world.add("val", (1, BOX)), world.add("val")]
    predictions = world.predict(
        "found",
        (val[0], 1, BOX, 0.8),
        (val[1], 1, BOX, 0.3),  # a false alarm on a good image of val
        (1, 1, BOX, 0.5),  # in test: just under the threshold
        (2, 2, BOX, 0.6),
    )
    metrics = evaluate(world.write(), predictions, threshold=None)
    assert metrics["threshold"]["value"] == pytest.approx((0.3 + 0.8) / 2)
    assert metrics["threshold"]["f1"] == 1
    assert [m["image_id"] for m in metrics["missed"]] == [1, 3, 4]


@pytest.mark.parametrize("case", ["no val split", "val not predicted", "nothing found"])
def test_threshold_falls_back_and_says_so(
    world: World, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = world.predict("found", (1, 1, BOX, 0.25), (2, 2, BOX, 0.24))
    if case != "no val split":
        world.add("val", (1, BOX))
    if case == "nothing found":
        predictions = world.predict("found", (1, 1, BOX, 0.25), (2, 2, BOX, 0.24))
    metrics = evaluate(world.write(), predictions, threshold=None)
    assert metrics["threshold"]["value"] == 0.25
    assert "default" in metrics["threshold"]["reason"]
    assert "0.250: the default" in " ".join(capsys.readouterr().out.split())
    assert [m["image_id"] for m in metrics["missed"]] == [2, 3, 4]


def test_the_cheapest_threshold_comes_from_the_val_split_alone(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    defective, also, good = world.add("val", (1, BOX)), world.add("val", (2, BOX)), world.add("val")
    predictions = world.predict(
        "found",
        (defective, 1, BOX, 0.9),
        (also, 1, BOX, 0.2),  # of the wrong class: but the part is called defective
        (good, 3, BOX, 0.6),
        (1, 1, BOX, 0.5),
        (2, 2, BOX, 0.1),
        (5, 1, BOX, 0.7),
    )
    data = world.write()
    cost = {"miss": 50, "false-alarm": 1}
    metrics = evaluate(data, predictions, threshold=None, cost=cost)
    assert metrics["threshold"] == {
        "value": pytest.approx(0.1),  # the middle of 0 to 0.2, where only the good image costs
        "reason": "the cheapest on the val split, 1 for 3 images at 50 for a miss and 1 for a "
        "false alarm",
        "f1": None,
    }
    # of six test images: image 1 and 2 called defective, 3 and 4 missed, 5 a false alarm
    expected = {"miss": 50, "false_alarm": 1, "misses": 2, "false_alarms": 1, "total": 101}
    assert metrics["cost"] == {**expected, "per_image": pytest.approx(101 / 6, abs=1e-6)}
    assert "Wrong decisions cost 101, 16.8 an image" in " ".join(capsys.readouterr().out.split())
    cost = {"miss": 1, "false-alarm": 50}
    metrics = evaluate(data, predictions, threshold=None, cost=cost)
    assert metrics["threshold"]["value"] == pytest.approx(0.75)
    assert metrics["cost"]["total"] == 4
    assert evaluate(data, predictions)["cost"] is None


def test_without_good_images_in_val_there_is_no_cheapest_threshold(world: World) -> None:
    image = world.add("val", (1, BOX))
    predictions = world.predict("found", (image, 1, BOX, 0.9))
    cost = {"miss": 50, "false-alarm": 1}
    metrics = evaluate(world.write(), predictions, threshold=None, cost=cost)
    assert metrics["threshold"]["value"] == 0.25
    reason = "the default, for the val split has no good images to weigh costs on"
    assert metrics["threshold"]["reason"] == reason


HALF = (20, 10, 20, 10)  # 10 columns of 30 in common with BOX: IoU 1/3


def test_review_figures_of_a_case_worked_out_by_hand(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = world.predict(
        "found",
        (1, 1, BOX, 0.9),
        (2, 2, HALF, 0.8),  # bad, and listed
        (3, 4, BOX, 0.7),  # of another class than the defect: on nothing, and not listed
        (4, 4, (14, 10, 20, 10), 0.6),  # IoU 2/3: listed in vain
        (5, 1, BOX, 0.6),  # on a good image, listed
        (6, 1, BOX, 0.4),  # under the score threshold
        quality=(0.9, 0.6, 0.8, 0.5, 0.65, 0.1),
    )
    truth_boxes = world.truth_boxes(quality=(0.95,) * 4)
    metrics = evaluate(
        world.write(), predictions, truth_boxes=truth_boxes, review_below=0.7, resamples=50
    )
    review = metrics["review"]
    assert (review["below"], review["reason"]) == (0.7, "as given")
    # ranks of quality 5, 2, 4, 1, 3 and of IoU 5, 3, 1.5, 4, 1.5
    assert review["predictions"] == {
        "masks": 5, "listed": 3, "bad": 3, "caught": 2, "on_nothing": 2, "on_nothing_caught": 1,
        "share_listed": 0.6,
        "share_caught": pytest.approx(2 / 3, abs=1e-6),
        "mean_absolute_error": pytest.approx((0.1 + 4 / 15 + 0.8 + 1 / 6 + 0.65) / 5, abs=1e-6),
        "spearman": pytest.approx(0.5 / np.sqrt(10 * 9.5), abs=1e-6),
    }  # fmt: skip
    assert review["truth_boxes"] == {
        "masks": 4, "listed": 0, "bad": 0, "caught": 0, "on_nothing": 0, "on_nothing_caught": 0,
        "share_listed": 0, "share_caught": None, "spearman": None,
        "mean_absolute_error": pytest.approx(0.05, abs=1e-6),
    }  # fmt: skip
    intervals = metrics["intervals"]
    assert "review.truth_boxes.share_caught" not in intervals
    for key in ("share_listed", "share_caught", "mean_absolute_error"):
        low, high = intervals[f"review.predictions.{key}"]
        assert low < review["predictions"][key] < high
    report = (world.root / "out" / "report.md").read_text()
    assert "| Bad masks listed | 2 of 3 [" in report
    assert "(quality.png)" in report
    assert cv2.imread(str(world.root / "out" / "quality.png")) is not None
    assert "2 of 3" in capsys.readouterr().out


def test_review_line_comes_from_the_val_split_alone(world: World) -> None:
    val = [world.add("val", (1, BOX)), world.add("val", (2, BOX)), world.add("val")]
    entries = (
        (val[0], 1, HALF, 0.8),  # badly drawn: the line is above it
        (val[1], 2, BOX, 0.8),
        (val[2], 1, BOX, 0.8),  # on nothing
        (val[1], 2, HALF, 0.1),  # under the score threshold
        (1, 1, HALF, 0.8),  # in test
    )
    predictions = world.predict("found", *entries, quality=(0.4, 0.6, 0.9, 0.65, 0.8))
    review = evaluate(world.write(), predictions)["review"]
    assert review["below"] == pytest.approx(0.5)
    assert "val split" in review["reason"] and "default" not in review["reason"]
    assert (review["predictions"]["bad"], review["predictions"]["caught"]) == (1, 0)


@pytest.mark.parametrize("case", ["no val split", "nothing badly drawn"])
def test_review_line_falls_back_and_says_so(world: World, case: str) -> None:
    entries = [(1, 1, BOX, 0.9)]
    if case == "nothing badly drawn":
        entries.append((world.add("val", (1, BOX)), 1, BOX, 0.9))
    metrics = evaluate(world.write(), world.predict("found", *entries, quality=(0.4, 0.2)))
    assert metrics["review"]["below"] == 0.7
    assert "default" in metrics["review"]["reason"]


def test_without_quality_there_is_no_review(world: World) -> None:
    entries = ((1, 1, BOX, 0.9), (2, 2, BOX, 0.9))
    predictions = world.predict("found", *entries, quality=(0.9, 0.9))
    assert evaluate(world.write(), predictions)["review"]["predictions"]["masks"] == 2
    for quality in ((), (None, None)):
        predictions = world.predict("found", *entries, quality=quality)
        assert evaluate(world.root / "data", predictions)["review"] is None
        assert not (world.root / "out" / "quality.png").exists()  # nor that of the first run
        assert "Mask quality" not in (world.root / "out" / "report.md").read_text()
    truth_boxes = world.truth_boxes(quality=(0.3,) * 4)
    review = evaluate(world.root / "data", predictions, truth_boxes=truth_boxes)["review"]
    assert review["predictions"] is None
    assert review["truth_boxes"]["listed"] == 4


def test_masks_of_the_val_split_have_to_fit_too(world: World) -> None:
    image = world.add("val", (1, BOX))
    predictions = world.predict("found", (1, 1, BOX, 0.9), (image, 1, BOX, 0.9), quality=(1, 1))
    edit(predictions / "predictions.json", lambda c: c[1]["segmentation"].update(size=[4, 5]))
    with pytest.raises(UserError, match=f"image {image}: expected masks of 64 rows"):
        evaluate(world.write(), predictions)


def test_intervals_surround_the_figures_and_are_seeded(tmp_path: Path) -> None:
    world = World(tmp_path)
    entries = []
    for i in range(40):
        image = world.add("test", (1, BOX)) if i % 2 else world.add("test")
        if i % 3:
            entries.append((image, 1, (10 + i % 4, 10, 20, 10), 0.5 + i / 100))
    data, predictions = world.write(), world.predict("found", *entries)
    metrics = evaluate(data, predictions, resamples=200, truth_boxes=world.truth_boxes())
    assert set(metrics["intervals"]) == {
        "box.map50", "box.map50_95", "mask.map50", "mask.map50_95",
        "mask.mean_iou_matched", "mask.mean_iou_all", "truth_boxes.mean_iou",
        "good_images.false_alarms_per_image", "recall_at_false_alarms.recall",
        "box.ap50_per_class.bent_lead", "box.ap_per_class.bent_lead",
        "mask.ap50_per_class.bent_lead", "mask.ap_per_class.bent_lead",
        *(
            f"image_decision.{name}.{key}"
            for name in ("detector", "majority")
            for key in ("accuracy", "balanced_accuracy", "macro_f1")
        ),
    }  # fmt: skip
    for key, (low, high) in metrics["intervals"].items():
        value: Any = metrics
        for part in key.split("."):
            value = value[part]
        assert 0 <= low <= value <= high
        if key not in ("truth_boxes.mean_iou", "image_decision.majority.balanced_accuracy"):
            assert low < high
    repeated = evaluate(data, predictions, resamples=200)
    assert repeated["intervals"]["box.map50_95"] == metrics["intervals"]["box.map50_95"]
    other = evaluate(data, predictions, resamples=200, seed=1)
    assert other["intervals"]["box.map50_95"] != metrics["intervals"]["box.map50_95"]


def test_published_rows_are_shown_for_the_classes_of_the_study_alone(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = evaluate(world.write(), world.predict("found"))
    assert [row["test"] for row in metrics["published"]["rows"]] == [
        0.873, 0.873, 0.889, 0.905, 0.905,
    ]  # fmt: skip
    assert "published; other split" in capsys.readouterr().out

    other = World(tmp_path / "other", classes=("scratch",))
    other.add("test", (1, BOX))
    assert evaluate(other.write(), other.predict("found"))["published"] is None
    assert "other split" not in capsys.readouterr().out


def test_output_folder_is_complete(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = world.predict("found", *((i, i, BOX, 0.9) for i in range(1, 5)))
    evaluate(world.write(), predictions, resamples=20)
    out = world.root / "out"
    assert {path.name for path in out.iterdir()} == {
        "metrics.json", "report.md", "images.csv", "pr_curves.png", "confusion.png",
        "config.yaml", "run.json", "errors",
    }  # fmt: skip
    assert [path.name for path in (out / "errors").iterdir()] == ["index.html"]  # there is none
    for plot in out.glob("*.png"):
        image = cv2.imread(str(plot))
        assert image is not None and min(image.shape[:2]) > 300
    printed = capsys.readouterr().out
    assert "Box mAP50" in printed and "always good" in printed
    assert "Running per image evaluation" not in printed  # pycocotools' chatter
    report = (out / "report.md").read_text()
    assert "| Box mAP50 | 1.000 | [1.00, 1.00] |" in report
    with pytest.raises(UserError, match="--force"):
        evaluate(world.root / "data", predictions, force=False)


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("found/images.json", lambda c: c["images"].pop(0), "image 1: expected bent_lead__001.png"),
        ("found/images.json", lambda c: c["images"][0].update(width=9), "found .* with 9x64"),
        ("found/images.json", lambda c: c["categories"].pop(), "expected the classes"),
        ("found/images.json", lambda c: c.pop("images"), "expected COCO images"),
        ("found/predictions.json", lambda c: c[0].update(category_id=5), "category of 1 to 4"),
        ("found/predictions.json", lambda c: c[0].pop("segmentation"), "all 2 entries or in none"),
        (
            "found/predictions.json",
            lambda c: c[0]["segmentation"].update(size=[4, 5]),
            "expected masks of 64 rows",
        ),
        (
            "found/predictions.json",
            lambda c: c[1].update(quality=0.5),
            "expected quality in all 2 entries or in none, found 1",
        ),
        ("found/predictions.json", lambda c: c[0].update(quality=1.5), "quality of 0 to 1, found"),
        ("truth_boxes/predictions.json", lambda c: c.pop(0), "--truth-boxes: expected a mask"),
        ("model/predictions.json", lambda c: c["classes"].pop(), "expected the classes"),
        ("model/predictions.json", lambda c: c["images"].pop("2"), "of cut_lead__002.png"),
        ("model/predictions.json", lambda c: c["images"]["2"].pop(), "expected 5 probabilities"),
        ("model/predictions.json", lambda c: c.pop("name"), "predictions of a classifier"),
    ],
)
def test_input_that_does_not_fit_is_refused(
    world: World, file: str, change: Any, message: str
) -> None:
    predictions = world.predict("found", (1, 1, BOX, 0.9), (2, 2, BOX, 0.9))
    options = {
        "truth_boxes": world.truth_boxes(),
        "classifiers": (world.classify("model", "m", dict.fromkeys(range(1, 7), "good")),),
    }
    data = world.write()
    edit(world.root / file, change)
    with pytest.raises(UserError, match=message):
        evaluate(data, predictions, **options)
    assert not (world.root / "out").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_split_is_not_taken_for_a_missing_one(
    world: World, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.add(split, (1, BOX))
    data, predictions = world.write(), world.predict("found", (1, 1, BOX, 0.9))
    path = data / "annotations" / f"instances_{split}.json"
    path.write_text(path.read_text()[:-20])
    command = ["evaluate", "--data", data, "--predictions", predictions, "--out", world.root / "o"]
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in command])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path}: expected a JSON file, found " in line
    assert not (world.root / "o").exists()


# All folds together


def in_folds(root: Path) -> World:
    """Two folds. Images 1 and 3 are tested in the first, 2 and 4 in the second; 3 and 4 are good.

    What one tests is the other's val split.
    """
    world = World(root, classes=("scratch",))
    for image in (((1, BOX),), ((1, BOX),), (), ()):
        number = len(world.images)
        image_id = world.add(f"fold{number % 2}_test", *image)
        world.add_again(f"fold{1 - number % 2}_val", image_id)
    return world


def predict_folds(world: World) -> Path:
    """The first fold's model scores high, the second's low; each also on the other's images."""
    world.predict(
        "found/fold0",
        (1, 1, BOX, 0.9),
        (3, 1, BOX, 0.7),
        (2, 1, BOX, 0.8),  # its val split: the best threshold is (0.8 + 0.6) / 2
        (4, 1, BOX, 0.6),
    )
    world.predict(
        "found/fold1",
        (2, 1, BOX, 0.4),
        (4, 1, BOX, 0.1),
        (1, 1, BOX, 0.3),  # its val split: (0.3 + 0.2) / 2
        (3, 1, BOX, 0.2),
    )
    return world.root / "found" / "fold{fold}"


def test_each_fold_is_measured_at_the_threshold_of_its_own_val_split(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    found = predict_folds(world)
    metrics = evaluate(world.write(), found, fold="all", threshold=None, resamples=20)
    assert metrics["fold"] == "all"
    assert metrics["threshold"]["value"] is None
    folds = metrics["folds"]
    assert [fold["threshold"]["value"] for fold in folds] == [
        pytest.approx(0.7), pytest.approx(0.25),
    ]  # fmt: skip
    assert [(fold["fold"], fold["images"], fold["instances"]) for fold in folds] == [
        (0, 2, 1), (1, 2, 1),
    ]  # fmt: skip
    assert [fold["box"]["map50"] for fold in folds] == [1, 1]
    # pooled, the first fold's alarm at 0.7 comes before the second fold's find at 0.4
    assert metrics["box"]["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert (metrics["images"], metrics["instances"], metrics["missed"]) == (4, 2, [])
    assert metrics["verdicts"] == {
        "hit": 2, "miss": 0, "wrong class": 0, "false alarm": 1, "correct": 1,
    }  # fmt: skip
    assert metrics["recall_at_false_alarms"]["recall"] == 0.5
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Evaluation of all folds" in report
    assert "| 1 | 2 | 1 | 0.250 | 1.000 | 1.000 |" in report


def test_the_predictions_of_all_folds_are_those_of_the_models_that_never_saw_the_image(
    tmp_path: Path,
) -> None:
    world = in_folds(tmp_path)
    evaluate(world.write(), predict_folds(world), fold="all", threshold=None)
    pooled = tmp_path / "out" / "out_of_fold"
    results = json.loads((pooled / "predictions.json").read_text())
    assert sorted((entry["image_id"], entry["score"]) for entry in results) == [
        (1, 0.9), (2, 0.4), (3, 0.7), (4, 0.1),
    ]  # fmt: skip
    images = json.loads((pooled / "images.json").read_text())["images"]
    assert sorted((image["id"], image["fold"]) for image in images) == [
        (1, 0), (2, 1), (3, 0), (4, 1),
    ]  # fmt: skip
    assert {round(image["threshold"], 3) for image in images} == {0.7, 0.25}
    again = evaluate(tmp_path / "data", tmp_path / "found" / "fold0", fold=0)
    assert again["folds"] is None
    assert not pooled.exists()  # nor what another evaluation has left


def test_classifiers_and_true_boxes_are_pooled_with_their_folds(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    wrong = {1: "good", 2: "good", 3: "scratch", 4: "scratch"}
    right = {1: "scratch", 2: "scratch", 3: "good", 4: "good"}
    for fold, tested in enumerate(((1, 3), (2, 4))):  # right about what it tests alone
        decisions = {i: right[i] if i in tested else wrong[i] for i in wrong}
        world.classify(f"classifier/fold{fold}", "net", decisions)
        world.truth_boxes(folder=f"truth/fold{fold}")
    metrics = evaluate(
        world.write(),
        predict_folds(world),
        fold="all",
        classifiers=(tmp_path / "classifier" / "fold{fold}",),
        truth_boxes=tmp_path / "truth" / "fold{fold}",
    )
    assert metrics["image_decision"]["net"]["accuracy"] == 1
    assert metrics["truth_boxes"]["mean_iou"] == 1
    assert metrics["threshold"]["value"] == 0.5  # as given, for all folds


def test_each_fold_has_its_own_line_of_review(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    world.predict(
        "found/fold0",
        (1, 1, BOX, 0.9),
        (2, 1, HALF, 0.9),
        (2, 1, BOX, 0.8),
        quality=(0.6, 0.7, 0.9),
    )  # badly drawn in its val split with 0.7: listed under 0.8
    world.predict(
        "found/fold1",
        (2, 1, BOX, 0.9),
        (1, 1, HALF, 0.9),
        (1, 1, BOX, 0.8),
        quality=(0.6, 0.2, 0.6),
    )  # with 0.2: listed under 0.4
    metrics = evaluate(world.write(), tmp_path / "found" / "fold{fold}", fold="all")
    assert [fold["review"]["below"] for fold in metrics["folds"]] == [
        pytest.approx(0.8), pytest.approx(0.4),
    ]  # fmt: skip
    assert metrics["review"]["below"] is None
    assert metrics["review"]["predictions"]["masks"] == 2
    assert metrics["review"]["predictions"]["listed"] == 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda w: None, "expected a JSON file, found nothing there"),
        (lambda w: w.add_again("fold1_test", 1), "tested in one fold, found 5 test images, 4 of"),
        (lambda w: w.add("test"), "each of 5 images to be tested in one fold, found 4"),
        (lambda w: w.splits.pop("fold0_test"), "expected folds .*, found none"),
    ],
)
def test_folds_that_are_not_a_partition_are_refused(
    tmp_path: Path, break_it: Any, message: str
) -> None:
    world = in_folds(tmp_path)
    break_it(world)
    with pytest.raises(UserError, match=message):
        evaluate(world.write(), tmp_path / "none" / "fold{fold}", fold="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictions": "p"}, r"--predictions: expected a path with {fold} .*, found p"),
        ({"truth_boxes": "t"}, r"--truth-boxes: expected a path with {fold} .*, found t"),
        ({"classifiers": ["{fold}/c", "d"]}, r"--classifiers: expected .*, found d"),
        ({"split": "val"}, "--split: expected 'test' beside --fold all, found 'val'"),
        ({"fold": "some"}, "--fold: expected the number of a fold, or 'all', found 'some'"),
    ],
)
def test_options_that_do_not_go_with_all_folds(options: Any, message: str) -> None:
    values = {"data": "d", "out": "o", "predictions": "p{fold}", "fold": "all"}
    with pytest.raises(UserError, match=message):
        build(EvaluateConfig, values | options)


def test_a_change_in_any_fold_is_noticed(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    config = build(
        EvaluateConfig,
        {"data": world.write(), "predictions": predict_folds(world), "out": "o", "fold": "all"},
    )
    before = record.signature("evaluate", config)
    assert record.signature("evaluate", config) == before
    edit(tmp_path / "found" / "fold1" / "predictions.json", lambda c: c.pop())
    assert record.signature("evaluate", config) != before
