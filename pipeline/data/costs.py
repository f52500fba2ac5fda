"""What wrong decisions on images cost, and the score threshold at which that is least.

An image is called defective if a box counts, that is if its highest score is at the threshold or
above. A miss is a defective image that is called good, a false alarm a good one called defective:
what an inspection line pays for, part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.data.dataset import Sample

Costs = Mapping[str, float]  # of a "miss" and a "false-alarm"


def image_scores(
    samples: Sequence[Sample], results: Mapping[int, Sequence[Mapping[str, Any]]]
) -> np.ndarray:
    """(images,) the highest score of each image's boxes, -inf without boxes."""
    return np.array(
        [max((e["score"] for e in results.get(s.image_id, ())), default=-np.inf) for s in samples],
        float,
    )


def wrong_decisions(
    scores: np.ndarray, defective: np.ndarray, thresholds: np.ndarray | float
) -> tuple[int, int]:
    """Misses and false alarms, given (images,) scores and which images are defective.

    `thresholds` is one score, or one for each image.
    """
    called = scores >= thresholds
    return int(np.count_nonzero(defective & ~called)), int(np.count_nonzero(called & ~defective))


def total(costs: Costs, misses: int, false_alarms: int) -> float:
    return costs["miss"] * misses + costs["false-alarm"] * false_alarms


def cheapest_threshold(
    scores: np.ndarray, defective: np.ndarray, costs: Costs
) -> tuple[float, float]:
    """The score threshold in [0, 1] at which wrong decisions cost least, and that cost.

    The cost is constant between neighbouring scores: of the intervals with the least cost the
    widest is taken (of equally wide ones, the higher), and its midpoint is the threshold.
    """
    inside = scores[(scores > 0) & (scores < 1)]
    edges = np.unique(np.concatenate([[0.0, 1.0], inside]))
    lowers, uppers = edges[:-1], edges[1:]
    found = np.array([total(costs, *wrong_decisions(scores, defective, t)) for t in uppers])
    best = found == found.min()
    starts = np.flatnonzero(best & ~np.append(False, best[:-1]))
    ends = np.flatnonzero(best & ~np.append(best[1:], False))
    widths = uppers[ends] - lowers[starts]
    widest = np.flatnonzero(widths == widths.max())[-1]
    return float((lowers[starts[widest]] + uppers[ends[widest]]) / 2), float(found.min())
