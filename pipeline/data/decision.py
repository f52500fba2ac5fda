"""The image decision: which class is this image? For classifiers and, by its boxes, the detector.

Classes are numbered with `good` as 0 and the defect classes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.dataset import GOOD, Sample
from pipeline.data.files import read_json
from pipeline.data.metrics import nanmean
from pipeline.data.predictions import PREDICTIONS
from pipeline.errors import UserError

WITH_ANOMALY = "detector_with_anomaly"  # the model of pipeline/data/joint_decision.py
OWN_MODELS = ("detector", WITH_ANOMALY, "majority")  # no classifier has these names


@dataclass(frozen=True)
class Probabilities:
    """What a classifier says: predictions.json of `pipeline finetune-classifier`."""

    name: str
    of_image: dict[int, np.ndarray]  # (1 + classes,) by image id; good first

    def decisions(self, samples: Sequence[Sample]) -> np.ndarray:
        """(images,) the most probable class."""
        return np.array([int(np.argmax(self.of_image[s.image_id])) for s in samples], int)


def read_probabilities(
    folder: Path, classes: Sequence[str], samples: Sequence[Sample]
) -> Probabilities:
    """Read a classifier's output folder. Raises `UserError` when it is not of these images."""
    path = folder / PREDICTIONS
    found = read_json(path)
    if not isinstance(found, dict) or not {"name", "classes", "images"} <= found.keys():
        raise UserError(f"{path}: expected predictions of a classifier, found other JSON")
    ours = [GOOD, *classes]
    if sorted(found["classes"]) != sorted(ours):
        raise UserError(f"{path}: expected the classes {ours}, found {found['classes']}")
    missing = [s.path.name for s in samples if str(s.image_id) not in found["images"]]
    if missing:
        raise UserError(
            *(f"{path}: expected probabilities of {name}, found none" for name in missing)
        )
    lengths = {len(row) for row in found["images"].values()}
    if lengths != {len(ours)}:
        raise UserError(
            f"{path}: expected {len(ours)} probabilities per image, found {sorted(lengths)}"
        )
    order = [found["classes"].index(name) for name in ours]
    of_image = {int(key): np.array(row)[order] for key, row in found["images"].items()}
    return Probabilities(found["name"], of_image)


def confusion_matrix(
    labels: np.ndarray, decisions: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> np.ndarray:
    """(classes, classes) images by true class (row) and decision (column).

    With `counts` (resamples, images) one matrix for each resample: (resamples, classes, classes).
    """
    cells = np.eye(classes**2, dtype=int)[labels * classes + decisions]  # one-hot: (images, cells)
    weights = np.ones(len(labels), int) if counts is None else counts
    sums = weights @ cells
    return sums.reshape(*sums.shape[:-1], classes, classes)


@dataclass(frozen=True)
class DecisionScores:
    """Scores of confusion matrices of shape (..., classes, classes)."""

    accuracy: np.ndarray  # (...)
    balanced_accuracy: np.ndarray  # (...) mean recall of the classes that occur
    macro_f1: np.ndarray  # (...) mean F1 of the classes that occur or are decided for
    recall: np.ndarray  # (..., classes) NaN for a class that does not occur


def decision_scores(confusion: np.ndarray) -> DecisionScores:
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    occur, decided = confusion.sum(axis=-1), confusion.sum(axis=-2)
    recall = _divide(right, occur)
    f1 = _divide(2 * right, occur + decided)
    accuracy = _divide(right.sum(axis=-1), occur.sum(axis=-1))
    return DecisionScores(accuracy, nanmean(recall), nanmean(f1), recall)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN for x / 0."""
    out = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)
