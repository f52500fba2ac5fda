"""The figures of the mask benchmark: a summary of each row, and their plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import common
from pipeline.data import metrics

RESAMPLES = 10_000
COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "truth_boxes": "#0072B2",
    "jittered_boxes": "#E69F00",
    "detector_boxes": "#009E73",
}

# One instance as run.py measured it: image, index in the image, class, fold; and one value of iou,
# dice, boundary_f1, quality and ms for each box it was given: none if the detector missed it.
Instance = Mapping[str, Any]


def mean(values: Sequence[float]) -> float:
    """Of an instance's values, one for each box; 0 for an instance that the detector missed."""
    return float(np.mean(values)) if values else 0.0


def summarise(
    instances: Sequence[Instance], classes: Sequence[str], seconds: list[float | None], seed: int
) -> dict[str, Any]:
    """The figures of one row; null where there is nothing to measure.

    `seconds` are those of the trainings, fold by fold: none for a row without training.
    """
    ious = np.array([mean(instance["iou"]) for instance in instances])
    names = np.array([instance["class"] for instance in instances])
    of_class = {name: ious[names == name] for name in classes}
    times = [ms for instance in instances for ms in instance["ms"]]
    summary: dict[str, Any] = {
        "instances": len(instances),
        "missed": sum(not instance["iou"] for instance in instances),
        "mean_iou": _rounded(ious.mean()),
        "mean_iou_interval": _interval(instances, ious, seed),
        "p10_iou": _tenth(ious),
        "iou_per_class": {k: _rounded(v.mean()) if v.size else None for k, v in of_class.items()},
        "p10_iou_per_class": {k: _tenth(v) for k, v in of_class.items()},
        "dice": _rounded(np.mean([mean(instance["dice"]) for instance in instances])),
        "boundary_f1": _rounded(np.mean([mean(instance["boundary_f1"]) for instance in instances])),
        "ms_per_box": round(float(np.median(times)), 1) if times else None,
    }
    if any(instance["quality"] for instance in instances):
        summary["quality"] = _quality(instances)
    if seconds:
        summary["train_seconds_per_fold"] = seconds
    return summary


def _tenth(ious: np.ndarray) -> float | None:
    """The IoU that nine of ten instances exceed."""
    return _rounded(np.percentile(ious, 10)) if ious.size else None


def _interval(instances: Sequence[Instance], ious: np.ndarray, seed: int) -> list[float]:
    """95 % bootstrap interval of the mean IoU over instances; images are drawn, not instances."""
    images, of = np.unique([instance["image"] for instance in instances], return_inverse=True)
    counts = metrics.draw_resamples(len(images), RESAMPLES, seed)
    resampled = metrics.ratio(counts, np.bincount(of, ious), np.bincount(of))
    return [_rounded(bound) for bound in metrics.percentile_interval(resampled)]


def _quality(instances: Sequence[Instance]) -> dict[str, float | None]:
    """How well SAM's own estimate of the IoU agrees with the IoU, over all masks."""
    estimated = np.array([value for instance in instances for value in instance["quality"]])
    true = np.array([value for instance in instances for value in instance["iou"]])
    varies = np.ptp(estimated) > 0 and np.ptp(true) > 0  # else there is no order to compare
    return {
        "spearman": _rounded(stats.spearmanr(estimated, true).statistic) if varies else None,
        "mean_absolute_error": _rounded(np.abs(estimated - true).mean()),
    }


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def plot(path: Path, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of the mean IoU with its interval: a group for each method and view, a bar for each
    kind of boxes. The keys of `summary` are `<method>/<view>/<boxes>`."""
    bars: dict[str, dict[str, common.Bar]] = {}
    for key, row in summary.items():
        group, _, kind = key.rpartition("/")
        bar = row["mean_iou"], row["mean_iou_interval"]
        bars.setdefault(group.removesuffix("/any"), {})[kind] = bar
    common.plot_bars(path, bars, COLOURS, "mean IoU of the masks, with 95 % interval")
