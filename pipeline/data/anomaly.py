"""Figures of anomaly scores: of images, and of the pixels of heat maps.

A score is higher the less an image, or a pixel, is like a good one. A figure that the data do not
define, such as the AUROC without defects, is NaN, and None where figures are made for JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from pipeline.data import metrics
from pipeline.data.masks import components

BINS = 2**16
PRO_LIMIT = 0.3  # false positive rate up to which the PRO curve counts


def image_auroc(scores: np.ndarray, defective: np.ndarray) -> float:
    """Area under the ROC curve; `scores` and `defective` (bool) are (images,)."""
    if defective.all() or not defective.any():
        return float("nan")
    return float(roc_auc_score(defective, scores))


def image_average_precision(scores: np.ndarray, defective: np.ndarray) -> float:
    """Average precision, without interpolation; arguments as of `image_auroc`."""
    return float(average_precision_score(defective, scores)) if defective.any() else float("nan")


def resampled_image_auroc(
    scores: np.ndarray, defective: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """(resamples,) AUROC of resamples, whose rows of `counts` say how often each image is drawn.

    It is the part of the pairs of a defective and a good image of which the defective one scores
    higher, ties for half (Hanley & McNeil, Radiology 143, 1982). NaN where one kind is not drawn.
    """
    bad, good = scores[defective][:, None], scores[~defective][None, :]
    wins = (bad > good) + 0.5 * (bad == good)
    drawn_bad, drawn_good = counts[:, defective], counts[:, ~defective]
    won = ((drawn_bad @ wins) * drawn_good).sum(axis=1)
    pairs = drawn_bad.sum(axis=1) * drawn_good.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def image_figures(
    scores: Mapping[str, np.ndarray], defective: Mapping[str, np.ndarray]
) -> dict[str, float | None]:
    """Figures of the images of `test`, with the threshold of the best F1 on those of `val`.

    Arguments are (images,) of each of these splits. `recall` and `false_alarm_rate` are the parts
    of the defective and of the good images that score at least the threshold.
    """
    best = metrics.best_threshold(scores["val"], defective["val"], int(defective["val"].sum()))
    found = scores["test"] >= best[0] if best else np.full(len(scores["test"]), np.nan)
    return {
        "auroc": number(image_auroc(scores["test"], defective["test"])),
        "average_precision": number(image_average_precision(scores["test"], defective["test"])),
        "threshold": number(best[0]) if best else None,
        "recall": _part(found[defective["test"]]),
        "false_alarm_rate": _part(found[~defective["test"]]),
    }


def _part(found: np.ndarray) -> float | None:
    return number(found.mean()) if len(found) else None


def number(value: Any) -> float | None:
    """A figure as JSON has it: six decimals, None for NaN."""
    return None if np.isnan(value) else round(float(value), 6)


class PixelScores:
    """The scores of the pixels of any number of images, counted in bins.

    Memory does not grow with the images. Scores in one bin, 1 / 65535 of the range from `low` to
    `high`, are taken for equal.
    """

    def __init__(self, low: float, high: float) -> None:
        self._low, self._step = low, ((high - low) or 1.0) / (BINS - 1)
        self._good = np.zeros(BINS)
        self._defect = np.zeros(BINS)
        self._regions = np.zeros(BINS)  # each region's pixels weigh 1 together

    def add(self, heat_map: np.ndarray, truth: np.ndarray) -> None:
        """Count an image's pixels; `heat_map` is (height, width) float, `truth` of that shape."""
        bins = np.rint((heat_map.astype(np.float64) - self._low) / self._step).astype(np.int64)
        bins = bins.clip(0, BINS - 1)
        self._good += np.bincount(bins[~truth], minlength=BINS)
        self._defect += np.bincount(bins[truth], minlength=BINS)
        for region in components(truth)[0]:
            of_region = bins[region]
            self._regions += np.bincount(of_region, minlength=BINS) / len(of_region)

    def auroc(self) -> float:
        """Area under the ROC curve of all pixels."""
        return _area(_rate(self._good), _rate(self._defect))

    def pro(self, limit: float = PRO_LIMIT) -> float:
        """Area under the PRO curve up to a false positive rate, divided by that rate.

        PRO, the per-region overlap, is the part of a region that is found, averaged over all
        connected regions (8 neighbours) of all images, so that a small defect counts as much as a
        large one. Bergmann et al., Uninformed Students, CVPR 2020, arXiv 1911.02357.
        """
        rate, overlap = _rate(self._good), _rate(self._regions)
        below = rate <= limit
        last = np.interp(limit, rate, overlap)
        return _area(np.append(rate[below], limit), np.append(overlap[below], last)) / limit

    def iou(self, threshold: float) -> float:
        """IoU with the truth of all pixels that score at least the threshold."""
        from_bin = int(np.ceil((threshold - self._low) / self._step))
        found = self._defect[max(from_bin, 0) :].sum()
        wrong = self._good[max(from_bin, 0) :].sum()
        union = self._defect.sum() + wrong
        return float(found / union) if self._defect.any() else float("nan")

    def best_threshold(self) -> float:
        """The threshold with the best IoU, between two bins; NaN without defects."""
        if not self._defect.any():
            return float("nan")
        found, wrong = _from_above(self._defect), _from_above(self._good)
        best = BINS - 1 - int(np.argmax(found / (self._defect.sum() + wrong)))
        return self._low + (best - 0.5) * self._step


def pixel_figures(pixels: Mapping[str, PixelScores]) -> dict[str, float | None]:
    """Figures of the pixels of `test`, with the threshold of the best IoU on those of `val`."""
    threshold = pixels["val"].best_threshold()
    return {
        "auroc": number(pixels["test"].auroc()),
        "pro": number(pixels["test"].pro()),
        "threshold": number(threshold),
        "iou": None if np.isnan(threshold) else number(pixels["test"].iou(threshold)),
    }


def _from_above(counts: np.ndarray) -> np.ndarray:
    """How many score at least as much as each bin, from the highest bin to the lowest."""
    return np.cumsum(counts[::-1])


def _rate(counts: np.ndarray) -> np.ndarray:
    """A curve's coordinate: the part that is above each threshold, from 0 to 1."""
    total = counts.sum()
    above = np.append(0.0, _from_above(counts))
    return above / total if total else np.full_like(above, np.nan)


def _area(x: np.ndarray, y: np.ndarray) -> float:
    if np.isnan(x).any() or np.isnan(y).any():
        return float("nan")
    return float(auc(x, y))
