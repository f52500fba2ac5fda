"""`pipeline evaluate`: the figures, and what is written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import pytest
from evaluated import BOX, CLASSES, World, evaluate, one_of_each

from pipeline.errors import UserError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return one_of_each(tmp_path)


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
