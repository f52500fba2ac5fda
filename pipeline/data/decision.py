"""The image decision: which class is this image? For classifiers and, by its boxes, the detector.

Classes are numbered with `good` as 0 and the defect classes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from pipeline.config.base import Fraction
from pipeline.data import stored
from pipeline.data.dataset import GOOD, Sample
from pipeline.data.metrics import nanmean
from pipeline.data.predictions import PREDICTIONS, mismatches
from pipeline.data.stored import Image, Images, Stored
from pipeline.errors import UserError

WITH_ANOMALY = "detector_with_anomaly"  # the model of pipeline/data/joint_decision.py
OWN_MODELS = ("detector", WITH_ANOMALY, "majority")  # no classifier has these names
ROUNDING = 1e-3  # of the sum of probabilities


def _check_sum(probabilities: list[float]) -> list[float]:
    if abs(sum(probabilities) - 1) > ROUNDING:
        raise ValueError(f"expected probabilities that sum to 1, found {sum(probabilities):g}")
    return probabilities


class _Classified(Image):
    probabilities: Annotated[list[Fraction], AfterValidator(_check_sum)]


class _Predictions(Stored):
    name: str
    classes: list[str]
    images: Images[_Classified]


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
    found = stored.read(path, _Predictions, "predictions of a classifier")
    ours = [GOOD, *classes]
    if sorted(found.classes) != sorted(ours):
        raise UserError(f"{path}: expected the classes {ours}, found {found.classes}")
    if problems := mismatches(path, [image.model_dump() for image in found.images], samples):
        raise UserError(stored.first_of(problems))
    lengths = {len(image.probabilities) for image in found.images}
    if lengths != {len(ours)}:
        raise UserError(
            f"{path}: expected {len(ours)} probabilities per image, found {sorted(lengths)}"
        )
    order = [found.classes.index(name) for name in ours]
    of_image = {image.id: np.array(image.probabilities)[order] for image in found.images}
    return Probabilities(found.name, of_image)


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
