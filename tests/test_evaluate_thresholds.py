"""`pipeline evaluate`: from which score a box counts, under which quality a mask is for review."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluated import BOX, HALF, World, evaluate, one_of_each


@pytest.fixture
def world(tmp_path: Path) -> World:
    return one_of_each(tmp_path)


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
