"""Figures of anomaly scores: of images, and of the pixels of heat maps.

A score is higher the less an image, or a pixel, is like a good one. A figure that the data do not
define, such as the AUROC without defects, is NaN.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import auc, average_precision_score, roc_auc_score

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
