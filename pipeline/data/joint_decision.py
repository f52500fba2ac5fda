"""The image decision of detector and anomaly detector together.

A detector that has seen few defects gives some of them low scores, and an anomaly detector does not
know what a defect is, but the two seldom err on the same image. A logistic regression of both
scores says how probably an image is defective. It is fitted to the val split, where all defective
images together weigh as much as all good ones, as in balanced accuracy. An image that is defective
more probably than not has the class of its best box, whatever the box's score. Without any box it
has no class, and counts as good here: whether it is anomalous is told by pipeline/data/unknown.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.data import costs, metrics
from pipeline.data.dataset import Sample
from pipeline.data.predictions import Anomaly, Predictions

LEAST_SCORE = 0.001  # of the best box: scores below it, and images without a box, are all alike


@dataclass(frozen=True)
class Joint:
    """What both say together of the images that they are asked about."""

    decisions: np.ndarray  # (images,) 0 for good, else the class of the best box
    probabilities: np.ndarray  # (images,) of being defective
    on_val: np.ndarray  # (val images,) the same, of the images that it was fitted to


def judge(
    samples: Sequence[Sample],
    val: Sequence[Sample],
    predictions: Predictions,
    anomaly: Mapping[int, Anomaly],
) -> Joint | None:
    """Decide about `samples`, by their boxes and by anomaly scores by image id.

    None where `val` cannot teach it: not all have an anomaly score, or all are of one kind.
    """
    defective = np.array([sample.label >= 0 for sample in val])
    known = all(sample.image_id in anomaly for sample in val)
    if not known or defective.all() or not defective.any():
        return None

    def scores(images: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        boxes = costs.image_scores(images, predictions.results)
        return boxes, np.array([anomaly[sample.image_id].score for sample in images])

    model = fit(*scores(val), defective)
    probabilities = probability(model, *scores(samples))
    best = [metrics.decide(predictions.of(sample, masks=False)) + 1 for sample in samples]
    decisions = np.where(probabilities > 0.5, best, 0)
    return Joint(decisions, probabilities, probability(model, *scores(val)))


def fit(box_scores: np.ndarray, anomaly_scores: np.ndarray, defective: np.ndarray) -> Pipeline:
    """What tells defective images from good ones by their two scores; all arrays are (images,).

    A box score is the highest of the image's boxes, -inf without boxes. Raises `ValueError` unless
    there are images of both kinds.
    """
    regression = LogisticRegression(class_weight="balanced")
    model = make_pipeline(StandardScaler(), regression)
    return model.fit(_features(box_scores, anomaly_scores), defective)


def probability(model: Pipeline, box_scores: np.ndarray, anomaly_scores: np.ndarray) -> np.ndarray:
    """(images,) how probably they are defective."""
    return model.predict_proba(_features(box_scores, anomaly_scores))[:, 1]


def _features(box_scores: np.ndarray, anomaly_scores: np.ndarray) -> np.ndarray:
    """(images, 2). Of a box, 0.02 instead of 0.01 says as much as 0.8 instead of 0.4."""
    return np.column_stack([np.log(np.maximum(box_scores, LEAST_SCORE)), anomaly_scores])
