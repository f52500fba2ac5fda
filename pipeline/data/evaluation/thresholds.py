"""The score from which a box counts, and the quality under which a mask is for review.

Both are chosen on the val split, unless they are given. Each comes with the reason why, as
metrics.json has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data import costs, metrics, quality
from pipeline.data.costs import Costs
from pipeline.data.dataset import Sample
from pipeline.data.matching import match
from pipeline.data.predictions import Predictions

DEFAULT_THRESHOLD = 0.25  # where none can be chosen
DEFAULT_REVIEW_BELOW = 0.7

# The score from which a box counts


def choose(
    given: float | None, cost: Costs | None, val: Sequence[Sample], predictions: Predictions
) -> dict[str, Any]:
    """The score `value` from which a box counts, the `reason`, and its `f1` if chosen for that.

    `val` has no images unless they were predicted.
    """
    if given is not None:
        return {"value": given, "reason": "as given", "f1": None}
    if not val:
        return _default("there are no predictions for a val split")
    if cost is not None:
        return _cheapest(cost, val, predictions)
    best = best_threshold(val, predictions)
    if best is None:
        return _default("no defect of the val split is found at any score")
    value, f1 = best
    reason = f"the best F1 of instances at IoU 0.5 on the val split ({f1:.3f})"
    return {"value": value, "reason": reason, "f1": round(f1, 6)}


def best_threshold(
    samples: Sequence[Sample], predictions: Predictions
) -> tuple[float, float] | None:
    """The score from which boxes have the best F1 of instances at IoU 0.5, and that F1.

    None if no instance is found at any score.
    """
    scores: list[float] = []
    hit: list[bool] = []
    for sample in samples:
        found = {p for _, p in match(sample.truth, predictions.of(sample, masks=False))}
        entries = predictions.results.get(sample.image_id, [])
        scores += [entry["score"] for entry in entries]
        hit += [p in found for p in range(len(entries))]
    truths = sum(len(sample.annotations) for sample in samples)
    return metrics.best_threshold(np.array(scores), np.array(hit, bool), truths)


def _cheapest(cost: Costs, val: Sequence[Sample], predictions: Predictions) -> dict[str, Any]:
    defective = np.array([sample.label >= 0 for sample in val])
    for kind, present in (("defective", defective.any()), ("good", not defective.all())):
        if not present:
            return _default(f"the val split has no {kind} images to weigh costs on")
    scores = costs.image_scores(val, predictions.results)
    value, least = costs.cheapest_threshold(scores, defective, cost)
    reason = f"the cheapest on the val split, {least:g} for {len(val)} images {_prices(cost)}"
    return {"value": value, "reason": reason, "f1": None}


def _prices(cost: Costs) -> str:
    return f"at {cost['miss']:g} for a miss and {cost['false-alarm']:g} for a false alarm"


def _default(why: str) -> dict[str, Any]:
    return {"value": DEFAULT_THRESHOLD, "reason": f"the default, for {why}", "f1": None}


def together(
    given: float | None, cost: Costs | None, chosen: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What is said of the thresholds of several parts; the value is null, for each has its own."""
    if len(chosen) == 1 or given is not None:
        return chosen[0]
    reason = "the best F1 of instances at IoU 0.5 on each fold's val split"
    if cost is not None:
        reason = f"the cheapest on each fold's val split {_prices(cost)}"
    return {"value": None, "reason": reason, "f1": None}


# The quality under which a mask is for review


def choose_review(
    given: float | None, val: Sequence[Sample], predictions: Predictions, threshold: float
) -> dict[str, Any]:
    """The quality `below` which a mask is for review, and the `reason`.

    Masks count from the score `threshold` on.
    """
    if given is not None:
        return {"below": given, "reason": "as given"}
    on_val = predictions.judge(val, [threshold] * len(val))
    below = None if on_val is None else quality.review_threshold(on_val)
    if below is None:
        why = "no mask of a val split is badly drawn"
        return {"below": DEFAULT_REVIEW_BELOW, "reason": f"the default, for {why}"}
    return {"below": below, "reason": "what lists every badly drawn mask of the val split"}


def review_together(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the qualities of several parts; `below` is null where they differ."""
    if all(its == chosen[0] for its in chosen):
        return chosen[0]
    return {"below": None, "reason": "what lists every badly drawn mask of each fold's val split"}
