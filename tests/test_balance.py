"""How often images of rare classes are shown, and how much they count."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import balance


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_every_class_comes_as_often_as_any_other(labels: list[int], seed: int) -> None:
    shown = balance.evenly(np.array(labels), np.random.default_rng(seed))
    largest = max(Counter(labels).values())
    assert Counter(labels[i] for i in shown) == dict.fromkeys(labels, largest)
    times = Counter(shown.tolist())
    assert set(times) == set(range(len(labels)))  # no image is left out
    for label in set(labels):
        of_class = [times[i] for i, own in enumerate(labels) if own == label]
        assert max(of_class) - min(of_class) <= 1


def test_the_order_is_random() -> None:
    labels = np.repeat([0, 1], 50)
    shown = labels[balance.evenly(labels, np.random.default_rng(0))]
    assert 10 < shown[:50].sum() < 40


def test_effective_number_weights_by_hand() -> None:
    """1, 2 and no images: effective numbers 1 and 1 + beta."""
    found = balance.effective_number_weights(np.array([0, 1, 1]), 3, beta=0.5)
    assert found == pytest.approx([2 * 1.5 / 2.5, 2 / 2.5, 0])  # 1 : 1 / 1.5, with a sum of 2


def test_effective_number_lies_between_none_and_the_inverse() -> None:
    labels = np.repeat([0, 1], [190, 10])
    none = balance.effective_number_weights(labels, 2, beta=0)
    some = balance.effective_number_weights(labels, 2)
    inverse = balance.effective_number_weights(labels, 2, beta=1 - 1e-9)
    ratios = [weights[1] / weights[0] for weights in (none, some, inverse)]
    assert ratios[0] == pytest.approx(1)
    assert ratios[2] == pytest.approx(19, rel=1e-3)
    assert 1 < ratios[1] < 19


def test_equal_weights_make_the_mean_over_classes() -> None:
    labels, losses = np.array([0, 0, 0, 2]), np.array([1.0, 2.0, 3.0, 10.0])
    weights = balance.equal_weights(labels, 4)
    assert weights.tolist() == pytest.approx([1 / 3, 0, 1, 0])
    assert np.average(losses, weights=weights[labels]) == pytest.approx((2 + 10) / 2)
