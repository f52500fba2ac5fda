"""Images that are anomalous though no known class was found on them: `evaluate --anomaly`."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import BOX, THRESHOLD, World, edit, evaluate, in_folds, predict_folds, score
from pydantic import ValidationError

from pipeline.data import unknown as unknowns
from pipeline.data.files import read_json
from pipeline.errors import UserError

CLASSES = ("crack", "hole")
# True class (0: good), box score (0: none) and its class, anomaly score, as images 1 to 9.
TEST = (
    (0, 0.3, 1, 1.0),
    (0, 0.6, 1, 1.0),  # a false alarm by its box
    (0, 0.0, 1, 9.0),  # a false alarm by its anomaly score
    (0, 0.2, 2, 1.0),
    (1, 0.1, 1, 7.0),  # unknown
    (1, 0.9, 1, 9.0),
    (2, 0.7, 1, 1.0),  # found as another class
    (2, 0.25, 2, 1.0),  # found at a lower threshold
    (2, 0.0, 1, 8.0),  # unknown
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A test split as above; of the classes the train split shows the first alone."""
    world = World(tmp_path, CLASSES)
    for label, *_ in TEST:
        world.add("test", *(((label, BOX),) if label else ()))
    world.add("train", (1, BOX))
    boxes = [(i, cls, BOX, score) for i, (_, score, cls, _) in enumerate(TEST, 1) if score]
    world.predict("found", *boxes)
    world.write()
    return world


def scores() -> dict[int, float]:
    return {i: value for i, (*_, value) in enumerate(TEST, start=1)}


def test_figures_of_a_case_worked_out_by_hand(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = evaluate(world.root / "data", world.root / "found")
    run = score(world, "anomaly", scores())
    metrics = evaluate(world.root / "data", world.root / "found", anomaly=run, resamples=200)
    unknown = metrics.pop("unknown")
    assert unknown["threshold"]["value"] == THRESHOLD
    assert (unknown["images"], unknown["images_per_class"]) == (
        3, {"good": 1, "crack": 1, "hole": 1},
    )  # fmt: skip
    third = pytest.approx(1 / 3, abs=1e-6)
    expected = {  # false alarms, all defects, cracks, holes
        "detector": (0.25, 0.4, 0.5, third),
        "detector_lowered": (0.5, 0.6, 0.5, 2 * third.expected),
        "anomaly": (0.25, 0.6, 1.0, third),
        "both": (0.5, 0.8, 1.0, 2 * third.expected),
    }
    for name, values in expected.items():
        found = unknown[name]
        classes = found["recall_per_class"].values()
        assert (found["false_alarm_rate"], found["recall"], *classes) == pytest.approx(
            values, abs=1e-6
        ), name
    assert unknown["detector_lowered"]["above_score"] == 0.2
    assert unknown["detector_lowered"]["share_at_score"] == 0
    assert unknown["gain"] == {"recall": 0.2, "recall_per_class": {"crack": 0.5, "hole": 0.0}}

    # All that is of boxes stays as it was; the second class is known to be unseen either way.
    assert alone.pop("unknown") is None
    assert metrics["unseen_classes"] == ["hole"]
    intervals = metrics.pop("intervals")
    assert metrics | {"resamples": 0, "intervals": {}} == alone
    for key in ("detector.recall", "both.recall", "gain.recall", "both.recall_per_class.hole"):
        value: Any = unknown
        for part in key.split("."):
            value = value[part]
        low, high = intervals[f"unknown.{key}"]
        assert low <= value <= high and low < high

    with (world.root / "out" / "images.csv").open(newline="") as file:
        decisions = [row["decision"] for row in csv.DictReader(file)]
    assert decisions == [
        "good", "crack", "unknown", "good", "unknown", "crack", "crack", "good", "unknown",
    ]  # fmt: skip
    errors = (world.root / "out" / "errors" / "index.html").read_text().split("<article>")[1:]
    said = [error for error in errors if "· the image is anomalous, no known class</p>" in error]
    assert len(said) == 2 and {"hole__009.png", "crack__005.png"} == {
        name for name in ("hole__009.png", "crack__005.png") for error in said if name in error
    }
    report = (world.root / "out" / "report.md").read_text()
    rows = [[cell.strip("| ") for cell in line.split(" | ")] for line in report.splitlines()]
    table = rows[rows.index(["## Images called defective"]) + 2 :][:9]
    assert table[0] == [
        "images",
        "boxes",
        "boxes, lowered",
        "anomaly score",
        "both",
        "gain",
        "unknown",
    ]
    assert table[2] == ["good", "0.250", "0.500", "0.250", "0.500", "–", "1"]
    assert table[4] == ["all defective", "0.400", "0.600", "0.600", "0.800", "0.200", "2"]
    assert table[7] == ["hole (unseen)", "0.333", "0.667", "0.333", "0.667", "0.000", "1"]
    assert [row[0] for row in table].count("95 % interval") == 3
    assert table[5][0] == "95 % interval" and table[5][1].startswith("[0.")
    assert "an anomaly score of 5.000 or more: the best F1 of images" in report
    assert "run. 3 images are." in report
    assert "No training image shows hole:" in report
    assert "Images called defective" in capsys.readouterr().out


def hits_at(alarms: float, points: list[tuple[float, float]]) -> float:
    """The hits of a ROC curve, from its corners (false alarms, hits), at a number of alarms."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= alarms < x1:
            return y0 + (y1 - y0) * (alarms - x0) / (x1 - x0)
    return points[-1][1]


def test_the_detector_alone_is_given_the_same_false_alarms_in_every_resample() -> None:
    """Against ROC curves drawn threshold by threshold, in each resample and part."""
    rng = np.random.default_rng(0)
    both = unknowns.Unknown(
        labels=rng.integers(0, 3, 60),
        part=np.repeat([0, 1], 30),
        box_score=np.where(rng.random(60) < 0.2, -np.inf, rng.integers(0, 10, 60) / 10),
        box_threshold=np.repeat([0.6, 0.8], 30),
        anomaly_score=rng.random(60),
        anomaly_threshold=np.repeat([0.3, 0.9], 30),  # in the first part, even boxes are too few
        reason="",
    )
    counts = rng.multinomial(60, np.full(60, 1 / 60), size=30)
    found = unknowns.rates(both, CLASSES, counts)
    good, defective = both.labels == 0, both.labels > 0
    for r, drawn in enumerate(counts):
        hits = 0.0
        for part in (0, 1):
            weights = drawn * (both.part == part)
            corners = [(0.0, 0.0)]
            for threshold in sorted({*both.box_score}, reverse=True):
                called = weights * (both.box_score >= threshold)
                corners.append((called[good].sum(), called[defective].sum()))
            alarms = (weights * (both.by_boxes | both.by_anomaly))[good].sum()
            hits += hits_at(alarms, corners)
        recall = found["detector_lowered", "recall"][r]
        assert recall == pytest.approx(hits / drawn[defective].sum())
        assert found["detector_lowered", "false_alarm_rate"][r] == pytest.approx(
            found["both", "false_alarm_rate"][r]
        )


def test_without_good_images_there_is_no_rate_to_equal(tmp_path: Path) -> None:
    world = World(tmp_path, CLASSES)
    world.add("test", (1, BOX))
    world.add("test", (2, BOX))
    found = world.predict("found", (1, 1, BOX, 0.9))
    run = score(world, "anomaly", {1: 1.0, 2: 6.0})
    unknown = evaluate(world.write(), found, anomaly=run, resamples=20)["unknown"]
    assert (unknown["detector"]["recall"], unknown["both"]["recall"]) == (0.5, 1.0)
    assert unknown["both"]["false_alarm_rate"] is None
    assert unknown["detector_lowered"]["recall"] is unknown["gain"]["recall"] is None


def test_scores_that_the_predictions_have(world: World) -> None:
    images = world.root / "found" / "images.json"
    value = scores()
    edit(
        images,
        lambda c: [
            i.update(anomaly={"score": value[i["id"]], "threshold": THRESHOLD})
            for i in c["images"]
            if i["id"] in value
        ],
    )
    unknown = evaluate(world.root / "data", world.root / "found")["unknown"]
    assert unknown["threshold"] == {"value": THRESHOLD, "reason": "that of the predictions"}
    assert unknown["images_per_class"] == {"good": 1, "crack": 1, "hole": 1}
    higher = evaluate(world.root / "data", world.root / "found", anomaly_threshold=8.5)["unknown"]
    assert higher["threshold"] == {"value": 8.5, "reason": "as given"}
    assert higher["images_per_class"] == {"good": 1, "crack": 0, "hole": 0}
    # A run that is named comes first.
    run = score(world, "anomaly", dict.fromkeys(value, 0.0))
    none = evaluate(world.root / "data", world.root / "found", anomaly=run)["unknown"]
    assert none["images"] == 0 and none["detector"] == none["both"]


def test_each_fold_has_its_own_run(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    found = predict_folds(world)  # image 2 is found at 0.4 of 0.25, image 1 at 0.9 of 0.7
    score(world, "anomaly/fold0", {1: 1.0, 3: 6.0}, fold=0)
    score(world, "anomaly/fold1", {2: 60.0, 4: 70.0}, fold=1, image={"threshold": 65.0})
    options: dict[str, Any] = {"fold": "all", "threshold": None, "resamples": 20}
    runs = tmp_path / "anomaly" / "fold{fold}"
    metrics = evaluate(world.write(), found, anomaly=runs, **options)
    assert [fold["anomaly_threshold"] for fold in metrics["folds"]] == [5.0, 65.0]
    unknown = metrics["unknown"]
    assert unknown["threshold"]["value"] is None
    # Image 3 has a box at the threshold already, image 4 has none.
    assert unknown["images_per_class"] == {"good": 1, "scratch": 0}
    assert unknown["detector"]["false_alarm_rate"] == 0.5
    assert unknown["both"]["false_alarm_rate"] == 1.0
    pooled = read_json(tmp_path / "out" / "out_of_fold" / "images.json")["images"]
    assert {image["id"]: image["anomaly"] for image in pooled} == {
        1: {"score": 1.0, "threshold": 5.0}, 2: {"score": 60.0, "threshold": 65.0},
        3: {"score": 6.0, "threshold": 5.0}, 4: {"score": 70.0, "threshold": 65.0},
    }  # fmt: skip
    assert "its fold or more" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValidationError, match=r"--anomaly: expected a path with \{fold\}"):
        evaluate(tmp_path / "data", found, anomaly=tmp_path / "anomaly" / "fold0", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": lambda c: c["images"].pop()}, "scores of all 9 images .*, found those of 8"),
        (
            {"scores": lambda c: c["images"][0].update(file_name="a.png")},
            "--anomaly: image 1: expected good__001.png with 64x64 pixels, found a.png with 64x64",
        ),
        ({"scores": lambda c: c.pop("images")}, "expected scores of `pipeline detect-anomaly`"),
        (
            {"metrics": lambda c: c["image"].update(threshold=None)},
            r"--anomaly: expected a threshold in .*metrics.json, found none.*--anomaly-threshold",
        ),
        (
            {"scores": lambda c: c["images"][0].update(score="high")},
            "scores.json: images.0.score: expected a number, found 'high'",
        ),
        (
            {"metrics": lambda c: c["image"].update(threshold="high")},
            "metrics.json: image.threshold: expected a number, found 'high'",
        ),
        (
            {"metrics": lambda c: c.update(image=[])},
            "metrics.json: image: expected keys and values, found ",
        ),
        ({"metrics": lambda c: c.update(fold=1)}, "expected .*'s single split, found one of .*1: "),
        ({"metrics": lambda c: c.pop("protocol")}, "expected figures of `pipeline detect-anomaly`"),
        (
            {"images": lambda c: c["images"][0].update(anomaly={"score": 1})},
            "images.json: images.0.anomaly.threshold: expected a value, found none",
        ),
    ],
)
def test_what_does_not_fit_is_refused(world: World, change: dict[str, Any], message: str) -> None:
    run = score(world, "anomaly", scores())
    paths = {
        "scores": run / "scores.json",
        "metrics": run / "metrics.json",
        "images": world.root / "found" / "images.json",
    }
    for name, edited in change.items():
        edit(paths[name], edited)
    with pytest.raises(UserError, match=message) as raised:
        evaluate(world.root / "data", world.root / "found", anomaly=run)
    assert len(raised.value.problems) == 1
    assert not (world.root / "out").exists()


def test_a_threshold_needs_scores(world: World) -> None:
    with pytest.raises(UserError, match="--anomaly-threshold: expected anomaly scores"):
        evaluate(world.root / "data", world.root / "found", anomaly_threshold=1.0)
    images = world.root / "found" / "images.json"
    edit(images, lambda c: c["images"][0].update(anomaly={"score": 1, "threshold": 2}))
    with pytest.raises(UserError, match="scores of all 9 images of the split, found those of 1"):
        evaluate(world.root / "data", world.root / "found")


def test_a_run_without_a_threshold_can_be_given_one(world: World) -> None:
    run = score(world, "anomaly", scores(), image={"threshold": None})
    metrics = evaluate(world.root / "data", world.root / "found", anomaly=run, anomaly_threshold=8)
    assert metrics["unknown"]["images_per_class"] == {"good": 1, "crack": 0, "hole": 1}
    assert json.loads((world.root / "out" / "run.json").read_text())["inputs"].keys() >= {"anomaly"}
