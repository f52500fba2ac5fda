"""The image decision of detector and anomaly detector together.

A detector that has seen few defects gives some of them low scores, and an anomaly detector does not
know what a defect is, but the two seldom err on the same image. A logistic regression of both
scores says how probably an image is defective. It is fitted to the val split, where all defective
images together weigh as much as all good ones, as in balanced accuracy. An image that is defective
more probably than not has the class of its best box, whatever the box's score. Without any box it
has no class, and counts as good here: whether it is anomalous is told by pipeline/data/unknown.py.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

LEAST_SCORE = 0.001  # of the best box: scores below it, and images without a box, are all alike


def fit(box_scores: np.ndarray, anomaly_scores: np.ndarray, defective: np.ndarray) -> Pipeline:
    """What tells defective images from good ones by their two scores; all arrays are (images,).

    A box score is the highest of the image's boxes, -inf without boxes. Raises `ValueError` unless
    there are images of both kinds.
    """
    regression = LogisticRegression(class_weight="balanced")
    model = make_pipeline(StandardScaler(), regression)
    return model.fit(_features(box_scores, anomaly_scores), defective)


def decide(
    model: Pipeline, box_scores: np.ndarray, anomaly_scores: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """(images,) 0 for good, else the class of the best box: `best`, which is 0 without boxes."""
    defective = model.predict(_features(box_scores, anomaly_scores))
    return np.where(defective, best, 0)


def _features(box_scores: np.ndarray, anomaly_scores: np.ndarray) -> np.ndarray:
    """(images, 2). Of a box, 0.02 instead of 0.01 says as much as 0.8 instead of 0.4."""
    return np.column_stack([np.log(np.maximum(box_scores, LEAST_SCORE)), anomaly_scores])
