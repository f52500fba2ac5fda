"""How probably an image is anomalous, and what that says of the boxes that were found in it.

A detector that has seen few defects gives right boxes low scores; an anomaly detector, which has
seen good images alone, knows that something is wrong, but not what. So the best box of an image is
as good as both say: it gets the mean of its own score and of the probability that the image is
anomalous, and the other boxes of the image stay in proportion to it.
"""

from __future__ import annotations

import numpy as np


def probability(score: float, threshold: float, spread: float) -> float:
    """How probably an image with this anomaly score is anomalous.

    At the threshold 0.5; with the spread, the standard deviation of the scores of good images, as
    the unit of a logistic curve. Without any spread it is a step.
    """
    if spread > 0:
        return float((1 + np.tanh((score - threshold) / spread / 2)) / 2)
    return float(score >= threshold)


def rescored(scores: np.ndarray, suspicion: float) -> np.ndarray:
    """(n,) the scores of an image's boxes, 0 to 1, given how probably the image is anomalous."""
    best = scores.max(initial=0)
    return scores if best == 0 else (scores + suspicion * scores / best) / 2
