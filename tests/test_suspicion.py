"""What the anomaly score of an image says of its boxes."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.suspicion import probability, rescored


def test_probability_rises_with_the_score() -> None:
    assert probability(3.0, 3.0, 0.5) == pytest.approx(0.5)
    assert probability(3.5, 3.0, 0.5) == pytest.approx(1 / (1 + np.exp(-1)))
    assert probability(2.5, 3.0, 0.5) == pytest.approx(1 - probability(3.5, 3.0, 0.5))
    assert probability(1e9, 3.0, 1e-9) == 1 and probability(-1e9, 3.0, 1e-9) == 0


def test_without_a_spread_it_is_a_step() -> None:
    assert [probability(score, 3.0, 0.0) for score in (2.9, 3.0, 3.1)] == [0, 1, 1]


def test_the_best_box_gets_the_mean_and_the_others_stay_in_proportion() -> None:
    scores = np.array([0.1, 0.4, 0.2])
    assert rescored(scores, 0.8) == pytest.approx([0.15, 0.6, 0.3])
    assert rescored(scores, 0.0) == pytest.approx(scores / 2)
    assert rescored(np.array([1.0]), 1.0) == pytest.approx([1.0])


def test_without_boxes_or_scores_nothing_changes() -> None:
    assert len(rescored(np.zeros(0), 1.0)) == 0
    assert rescored(np.zeros(2), 1.0).tolist() == [0, 0]
