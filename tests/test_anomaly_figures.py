"""Figures of anomaly scores, against cases worked out by hand and a slow, plain implementation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from pipeline.data.anomaly import PixelScores, image_auroc, image_average_precision

nan = pytest.approx(math.nan, nan_ok=True)


def test_image_figures_by_hand() -> None:
    """Of six pairs of a defective and a good image one is in the wrong order, and one is a tie."""
    scores = np.array([0.9, 0.3, 0.5, 0.3, 0.1])
    defective = np.array([True, True, False, False, False])
    assert image_auroc(scores, defective) == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    # Precision 1 at recall 1/2; at a score of 0.3 two of four are defective.
    assert image_average_precision(scores, defective) == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)


def test_what_the_images_do_not_define() -> None:
    scores = np.array([0.1, 0.2])
    for defective in ([True, True], [False, False]):
        assert image_auroc(scores, np.array(defective)) == nan
    assert image_average_precision(scores, np.array([False, False])) == nan


def test_pixel_figures_by_hand() -> None:
    """Ten good pixels, a region of two pixels and a region of one.

    From above: half of the first region at 0.9; one good pixel at 0.8; the second region at 0.7;
    two good pixels at 0.6; all else at 0. So (false positive rate, PRO) goes through (0, 0.25),
    (0.1, 0.25), (0.1, 0.75), (0.3, 0.75) to (1, 1).
    """
    truth = np.zeros((1, 13), bool)
    truth[0, [0, 1, 4]] = True
    heat = np.zeros((1, 13))
    heat[0, 0], heat[0, 4] = 0.9, 0.7
    heat[0, 6] = 0.8
    heat[0, 8:10] = 0.6
    pixels = PixelScores(0, 0.9)
    pixels.add(heat, truth)
    assert pixels.pro(0.3) == pytest.approx((0.1 * 0.25 + 0.2 * 0.75) / 0.3)
    assert pixels.pro(0.2) == pytest.approx((0.1 * 0.25 + 0.1 * 0.75) / 0.2)
    between = 0.75 + 0.25 * 0.1 / 0.7  # at a rate of 0.4, on the last line
    assert pixels.pro(0.4) == pytest.approx(
        (0.1 * 0.25 + 0.2 * 0.75 + 0.1 * (0.75 + between) / 2) / 0.4
    )
    # Of 30 pairs: the first region's pixel is above all 10, its other ties with 7 zeros, and the
    # second region is above 9.
    assert pixels.auroc() == pytest.approx((10 + 7 / 2 + 9) / 30)
    assert pixels.iou(0.65) == pytest.approx(2 / 4)
    assert pixels.iou(0.85) == pytest.approx(1 / 3)
    assert pixels.iou(-1) == pytest.approx(3 / 13)
    assert pixels.iou(5) == 0
    # The best IoU is 2 / 4, from just under 0.7 on.
    assert 0.7 - 2e-5 < pixels.best_threshold() < 0.7


def slow_pro(heat: list[np.ndarray], truth: list[np.ndarray], limit: float) -> float:
    """The area as it is defined, with a threshold at every value that occurs."""
    regions = [
        (i, labels == k)
        for i, mask in enumerate(truth)
        for labels, count in [ndimage.label(mask, np.ones((3, 3)))]
        for k in range(1, count + 1)
    ]
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([h.ravel() for h in heat]))[::-1]:
        found = [h >= threshold for h in heat]
        good = [f[~t] for f, t in zip(found, truth, strict=True)]
        rate = float(np.concatenate(good).mean())
        points.append((rate, float(np.mean([found[i][region].mean() for i, region in regions]))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


@pytest.mark.parametrize("seed", range(4))
def test_pixel_figures_of_several_images(seed: int) -> None:
    """Images of several sizes, one of them good, with many ties and touching regions."""
    rng = np.random.default_rng(seed)
    truth = [rng.random(shape) < 0.15 for shape in ((12, 9), (8, 17))] + [np.zeros((10, 10), bool)]
    heat = [rng.integers(-5, 10, t.shape) + 3.0 * t for t in truth]
    pixels = PixelScores(-5, 12)
    for h, t in zip(heat, truth, strict=True):
        pixels.add(h, t)
    for limit in (0.05, 0.3, 1.0):
        assert pixels.pro(limit) == pytest.approx(slow_pro(heat, truth, limit))
    every_heat = np.concatenate([h.ravel() for h in heat])
    every_truth = np.concatenate([t.ravel() for t in truth])
    assert pixels.auroc() == pytest.approx(roc_auc_score(every_truth, every_heat))
    ious = {
        t: (every_truth & (every_heat >= t)).sum() / (every_truth | (every_heat >= t)).sum()
        for t in np.unique(every_heat)
    }
    for threshold, iou in ious.items():
        assert pixels.iou(threshold - 0.5) == pytest.approx(iou)
    assert pixels.iou(pixels.best_threshold()) == pytest.approx(max(ious.values()))


def test_what_the_pixels_do_not_define() -> None:
    pixels = PixelScores(0, 1)
    pixels.add(np.ones((3, 3)), np.zeros((3, 3), bool))
    assert pixels.auroc() == nan
    assert pixels.pro() == nan
    assert pixels.iou(0.5) == nan
    assert pixels.best_threshold() == nan


def test_heat_maps_that_are_all_equal_tell_nothing() -> None:
    pixels = PixelScores(2, 2)
    pixels.add(np.full((4, 4), 2.0), np.eye(4, dtype=bool))
    assert pixels.auroc() == pytest.approx(0.5)
    assert pixels.pro() == pytest.approx(0.15)  # the diagonal, up to 0.3
