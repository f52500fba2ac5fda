"""`pipeline evaluate --fold all`: every image with the models of its fold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluated import BOX, HALF, edit, evaluate, in_folds, predict_folds

from pipeline import record
from pipeline.config import EvaluateConfig, build
from pipeline.errors import UserError


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


@pytest.mark.parametrize("option", ["predictions", "truth_boxes", "classifiers"])
def test_what_another_fold_has_learned_is_refused(tmp_path: Path, option: str) -> None:
    """It may have seen the images in training."""
    world = in_folds(tmp_path)
    world.classify("net", "net", dict.fromkeys(range(1, 5), "good"))
    folders = {
        "predictions": predict_folds(world).parent / "fold0",
        "truth_boxes": world.truth_boxes(),
        "classifiers": tmp_path / "net",
    }
    path = folders[option] / "config.yaml"
    predictions = folders.pop("predictions")
    options: dict[str, Any] = {**folders, "classifiers": (folders["classifiers"],), "fold": 0}
    for fold, words in ((1, "fold 1"), (None, "single split"), ("x", "fold x")):
        path.write_text(json.dumps({"fold": fold}))
        with pytest.raises(UserError, match=f"{path}: expected .*'s fold 0, found .*'s {words}$"):
            evaluate(world.write(), predictions, **options)
    path.write_text('{"fold": 0}')
    evaluate(world.write(), predictions, **options)


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
