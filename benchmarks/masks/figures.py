"""The figures of the mask benchmark: a summary of each row, and their plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

from pipeline.data import metrics
from pipeline.data.files import atomic_path

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
    groups = list(dict.fromkeys(key.rpartition("/")[0] for key in summary))
    kinds = [kind for kind in COLOURS if any(key.endswith(f"/{kind}") for key in summary)]
    thickness = 0.8 / len(kinds)
    height = 1.2 + len(groups) * (0.2 + 0.2 * len(kinds))
    figure, axis = plt.subplots(figsize=(8, height))
    for k, kind in enumerate(kinds):
        rows = {g: summary[f"{g}/{kind}"] for g in groups if f"{g}/{kind}" in summary}
        places = [groups.index(g) + (k - (len(kinds) - 1) / 2) * thickness for g in rows]
        means = np.array([row["mean_iou"] for row in rows.values()])
        low, high = np.array([row["mean_iou_interval"] for row in rows.values()]).T
        axis.barh(places, means, thickness, color=COLOURS[kind], label=kind.replace("_", " "))
        axis.errorbar(
            means,
            places,
            xerr=[np.maximum(means - low, 0), np.maximum(high - means, 0)],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
        for place, value in zip(places, means, strict=True):
            axis.text(0.01, place, f"{value:.2f}", va="center", fontsize=8, color="white")
    axis.set_yticks(range(len(groups)), [group.removesuffix("/any") for group in groups])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="mean IoU of the masks, with 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
    with atomic_path(path) as temporary:
        # equal bytes on equal input
        figure.savefig(temporary, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
