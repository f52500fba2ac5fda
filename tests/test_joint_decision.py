"""The image decision of detector and anomaly detector together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import evaluate, in_folds, predict_folds, score
from scipy.optimize import minimize

from pipeline.data import joint_decision
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json
from pipeline.data.predictions import Anomaly, read_predictions

NONE = -np.inf  # without a box
BOXES = np.array([0.002, NONE, 0.2, 0.004, 0.9, 0.05, 0.01])
ANOMALY = np.array([1.0, 1.2, 1.1, 2.5, 3.0, 2.8, 2.0])
DEFECTIVE = np.array([False, False, False, False, True, True, True])


def test_each_score_makes_up_for_the_other() -> None:
    model = joint_decision.fit(BOXES, ANOMALY, DEFECTIVE)
    boxes, anomaly = np.array([0.9, 0.02, 0.02, 0.002]), np.array([1.6, 3.0, 1.0, 1.2])
    found = joint_decision.probability(model, boxes, anomaly)
    assert (found > 0.5).tolist() == [True, True, False, False]


def test_the_probability_is_that_of_a_balanced_logistic_regression() -> None:
    """Against the loss as it is written, with an L2 penalty of half the squared weights."""
    x = np.column_stack([np.log(np.where(BOXES == NONE, 0.001, BOXES)), ANOMALY])
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    weight = np.where(DEFECTIVE, 7 / (2 * 3), 7 / (2 * 4))

    def loss(parameters: np.ndarray) -> float:
        logits = x @ parameters[:2] + parameters[2]
        sign = np.where(DEFECTIVE, 1, -1)
        return float(
            (weight * np.log1p(np.exp(-sign * logits))).sum() + (parameters[:2] ** 2).sum() / 2
        )

    found = minimize(loss, np.zeros(3), tol=1e-10).x
    expected = 1 / (1 + np.exp(-(x @ found[:2] + found[2])))
    model = joint_decision.fit(BOXES, ANOMALY, DEFECTIVE)
    assert joint_decision.probability(model, BOXES, ANOMALY) == pytest.approx(expected, abs=1e-3)


def test_an_image_without_a_box_has_no_class(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    data = Dataset(world.write())
    predict_folds(world)
    samples, val = data.split("test", 0), data.split("val", 0)
    found = read_predictions(tmp_path / "found" / "fold0", data.classes, samples, val)
    anomaly = {s.image_id: Anomaly(9.0 if s.label >= 0 else 1.0, 5.0) for s in [*samples, *val]}
    without = dataclasses.replace(found, results={val[0].image_id: []})
    joint = joint_decision.judge(samples, val, without, anomaly)
    assert joint is not None and joint.decisions.tolist() == [0] * len(samples)
    defective = np.array([sample.label >= 0 for sample in samples])
    assert ((joint.probabilities > 0.5) == defective).all() and defective.any()


def test_one_kind_of_images_teaches_nothing() -> None:
    with pytest.raises(ValueError, match="class"):
        joint_decision.fit(BOXES[:3], ANOMALY[:3], DEFECTIVE[:3])


def test_each_fold_decides_by_what_its_val_split_shows(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    found = predict_folds(world)  # image 3, which is good, has a box at its fold's threshold
    score(world, "anomaly/fold0", {1: 5.0, 3: 1.0, 2: 6.0, 4: 1.5}, fold=0)
    score(world, "anomaly/fold1", {2: 60.0, 4: 20.0, 1: 70.0, 3: 10.0}, fold=1)
    options: dict[str, Any] = {"fold": "all", "threshold": None, "resamples": 20}
    options["anomaly"] = tmp_path / "anomaly" / "fold{fold}"
    metrics = evaluate(world.write(), found, **options)
    assert list(metrics["image_decision"]) == ["detector", "detector_with_anomaly", "majority"]
    assert metrics["image_decision"]["detector"]["confusion"] == [[1, 1], [0, 2]]
    assert metrics["image_decision"]["detector_with_anomaly"]["confusion"] == [[2, 0], [0, 2]]
    assert "image_decision.detector_with_anomaly.accuracy" in metrics["intervals"]
    assert "detector_with_anomaly" in (tmp_path / "out" / "report.md").read_text()

    # Of one fold, nothing can be learned: its val split has no scores.
    score(world, "anomaly/fold1", {2: 60.0, 4: 20.0}, fold=1)
    metrics = evaluate(world.root / "data", found, **options)
    assert list(metrics["image_decision"]) == ["detector", "majority"]


def test_a_val_split_of_one_kind_teaches_nothing(tmp_path: Path) -> None:
    world = in_folds(tmp_path)
    data = world.write()
    predict_folds(world)
    run = score(world, "anomaly", {1: 5.0, 3: 1.0, 2: 6.0, 4: 1.5}, fold=0)
    val = data / "annotations" / "instances_fold0_val.json"
    content = read_json(val)
    content["images"] = [image for image in content["images"] if image["id"] == 2]
    write_json(val, content)
    folder = tmp_path / "found" / "fold0"
    metrics = evaluate(data, folder, fold=0, anomaly=run, threshold=0.5)
    assert list(metrics["image_decision"]) == ["detector", "majority"]
    assert metrics["unknown"] is not None
