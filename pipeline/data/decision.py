"""The image decision: which class is this image? For classifiers and, by its boxes, the detector.

Classes are numbered with `good` as 0 and the defect classes after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.metrics import nanmean


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
