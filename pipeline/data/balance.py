"""Rare classes: how often their images are shown, and how much each of them counts."""

from __future__ import annotations

import numpy as np

BETA = 0.999  # of the effective number of images; Cui et al. try 0.9 to 0.9999


def evenly(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of images such that every class comes as often as the largest one, in random order.

    `labels` (n,) are class indices; the result has (classes that occur x largest class,) places.
    Within a class, no image comes more than once more often than another.
    """
    largest = np.bincount(labels).max()
    places = [
        np.resize(rng.permutation(np.flatnonzero(labels == label)), largest)
        for label in np.unique(labels)
    ]
    return rng.permutation(np.concatenate(places))


def effective_number_weights(labels: np.ndarray, classes: int, beta: float = BETA) -> np.ndarray:
    """(classes,) weights of the classes in a loss, 0 for one without images.

    The inverse of a class's effective number of images, (1 - beta^n) / (1 - beta) for n of them
    (Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, arXiv
    1901.05555): between no weights (beta 0) and the inverse of n (beta towards 1). As there, the
    weights add up to the number of classes: of those that occur.
    """
    counts = np.bincount(labels, minlength=classes)
    occurs = counts > 0
    weights = np.zeros(classes)
    weights[occurs] = (1 - beta) / (1 - beta ** counts[occurs])
    return weights * occurs.sum() / weights.sum()


def equal_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes,) weights with which each class that occurs counts the same, 0 for others.

    They are one over a class's number of images, so the weighted mean of a loss over images is the
    mean over classes of the class's mean.
    """
    counts = np.bincount(labels, minlength=classes)
    return np.divide(1.0, counts, out=np.zeros(classes), where=counts > 0)
