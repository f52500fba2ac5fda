"""What is read of the images that one model is measured on: of a split, or of a fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig, of_fold
from pipeline.data import heatmaps, joint_decision, stored
from pipeline.data.dataset import Dataset, Sample, learned_classes
from pipeline.data.decision import OWN_MODELS, read_probabilities
from pipeline.data.evaluation import thresholds
from pipeline.data.masks import dice, iou
from pipeline.data.matching import match
from pipeline.data.predictions import Anomaly, Predictions, read_predictions
from pipeline.errors import UserError


@dataclass(frozen=True)
class Part:
    """The images that one model is measured on, what it says of them, and its threshold."""

    fold: int | None
    samples: Sequence[Sample]
    predictions: Predictions
    oracle: Predictions | None  # masks from true boxes
    true_boxes: Sequence[np.ndarray]  # (2, n) IoU and Dice of these masks, image by image
    classifiers: dict[str, np.ndarray]  # (images,) decisions by name
    threshold: dict[str, Any]  # the score from which a box counts, and why
    review: dict[str, Any]  # the quality under which a mask is listed, and why
    anomaly: Sequence[Anomaly] | None  # image by image; None: not known
    anomaly_reason: str  # of the anomaly threshold
    joint: np.ndarray | None  # (images,) decisions with the anomaly scores; None: not known
    unseen: Sequence[str]  # classes that no training image shows


def read_part(
    config: EvaluateConfig, dataset: Dataset, fold: int | None, samples: Sequence[Sample]
) -> Part:
    """Read what was predicted for these images, check it, and choose the thresholds.

    Raises `UserError` for what is missing, damaged, or of other images.
    """
    assert config.predictions is not None

    def folder(path: Path) -> Path:
        return of_fold(path, fold) if config.fold == "all" and fold is not None else path

    classes = dataset.classes
    val = dataset.split_if_any("val", fold)
    for path in (config.predictions, config.truth_boxes, *config.classifiers):
        if path is not None:
            stored.check_fold(folder(path), fold)
    predictions = read_predictions(folder(config.predictions), classes, samples, val)
    oracle, true_boxes = None, []
    if config.truth_boxes is not None:
        oracle = read_predictions(folder(config.truth_boxes), classes, samples)
        true_boxes = [_overlaps(oracle, sample) for sample in samples]
    classifiers = _read_classifiers([folder(c) for c in config.classifiers], classes, samples)
    if not predictions.images.issuperset(sample.image_id for sample in val):
        val = []
    threshold = thresholds.choose(config.threshold, config.cost, val, predictions)
    review = thresholds.choose_review(config.review_below, val, predictions, threshold["value"])
    anomalies = None if config.anomaly is None else folder(config.anomaly)
    known = _read_anomaly(config, anomalies, fold, predictions, samples)
    joint = None if known is None else joint_decision.judge(samples, val, predictions, known)
    return Part(
        fold=fold,
        samples=samples,
        predictions=predictions,
        oracle=oracle,
        true_boxes=true_boxes,
        classifiers=classifiers,
        threshold=threshold,
        review=review,
        anomaly=None if known is None else [known[sample.image_id] for sample in samples],
        anomaly_reason=_anomaly_reason(config),
        joint=None if joint is None else joint.decisions,
        unseen=_unseen(dataset, fold),
    )


def _overlaps(oracle: Predictions, sample: Sample) -> np.ndarray:
    """(2, n) IoU and Dice of the masks prompted with an image's n true boxes.

    Raises `UserError` when a true box has no mask.
    """
    truth, predicted = sample.truth, oracle.of(sample)
    pairs = sorted(match(truth, predicted))
    if len(pairs) < len(truth) or (pairs and predicted.mask is None):
        raise UserError(
            f"--truth-boxes: expected a mask for each of {len(truth)} true boxes of "
            f"{sample.path.name}, found {len(pairs) if predicted.mask is not None else 0}"
        )
    if truth.mask is None or predicted.mask is None:
        return np.zeros((2, 0))
    masks = [(truth.mask[t], predicted.mask[p]) for t, p in pairs]
    return np.array([[measure(a, b) for a, b in masks] for measure in (iou, dice)])


def _read_classifiers(
    folders: Sequence[Path], classes: Sequence[str], samples: Sequence[Sample]
) -> dict[str, np.ndarray]:
    """Each classifier's decisions by name: (images,) with good as 0 and the classes after it."""
    decisions: dict[str, np.ndarray] = {}
    for folder in folders:
        found = read_probabilities(folder, classes, samples)
        name = found.name
        if name in (*decisions, *OWN_MODELS):
            name = f"{name} ({folder.name})"
        decisions[name] = found.decisions(samples)
    return decisions


def _unseen(dataset: Dataset, fold: int | None) -> list[str]:
    """The classes that no training image shows, where there are training images with defects."""
    learned = learned_classes(dataset.split_if_any("train", fold), dataset.classes)
    return [name for name in dataset.classes if learned and name not in learned]


# With an anomaly detector


def _read_anomaly(
    config: EvaluateConfig,
    folder: Path | None,
    fold: int | None,
    predictions: Predictions,
    samples: Sequence[Sample],
) -> dict[int, Anomaly] | None:
    """Anomaly scores and thresholds by image id, of --anomaly or of the predictions.

    All `samples` have one; those of other images are not checked.
    """
    given = config.anomaly_threshold
    if folder is None:
        where, found = config.predictions, dict(predictions.anomaly)
        if given is not None:
            found = {key: Anomaly(its.score, given) for key, its in found.items()}
    else:
        heatmaps.check_dataset(folder, fold)
        where, scored = folder / heatmaps.SCORES, heatmaps.read_by_id(folder, fold)
        threshold = heatmaps.read_threshold(folder) if given is None else given
        for sample in samples:
            if (its := scored.get(sample.image_id)) is not None:
                its.check("--anomaly", sample.path.name, sample.width, sample.height)
        found = {key: Anomaly(its.score, threshold) for key, its in scored.items()}
    missing = sum(sample.image_id not in found for sample in samples)
    if folder is None and missing == len(samples):
        if given is not None:
            raise UserError(
                "--anomaly-threshold: expected anomaly scores (--anomaly, or of the predictions), "
                f"found none in {where}"
            )
        return None
    if missing:
        raise UserError(
            f"{where}: expected anomaly scores of all {len(samples)} images of the split, found "
            f"those of {len(samples) - missing}"
        )
    return found


def _anomaly_reason(config: EvaluateConfig) -> str:
    if config.anomaly_threshold is not None:
        return "as given"
    if config.anomaly is None:
        return "that of the predictions"
    return "the best F1 of images on the val split of the anomaly detector's run"
