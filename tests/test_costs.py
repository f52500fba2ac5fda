"""Costs of wrong decisions, and the threshold where they are least."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.config import EvaluateConfig, build
from pipeline.data.costs import cheapest_threshold, wrong_decisions
from pipeline.errors import UserError

NONE = -np.inf  # an image without boxes
COSTS = {"miss": 50.0, "false-alarm": 1.0}


def arrays(*images: tuple[float, bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s for s, _ in images], float), np.array([d for _, d in images], bool)


def test_an_image_is_called_defective_from_the_threshold_on() -> None:
    scores, defective = arrays((0.5, True), (0.4, True), (0.5, False), (NONE, False), (NONE, True))
    assert wrong_decisions(scores, defective, 0.5) == (2, 1)
    assert wrong_decisions(scores, defective, np.array([0.6, 0.4, 0.6, 0.0, 0.0])) == (2, 0)


@pytest.mark.parametrize(
    ("images", "costs", "expected"),
    [
        # the gap between both kinds is the widest interval without a wrong decision
        ([(0.9, True), (0.7, True), (0.2, False), (NONE, False)], COSTS, (0.45, 0)),
        # a miss costs as much as fifty false alarms: all good images are called defective
        ([(0.1, True), (0.6, False), (0.8, False), (0.9, True)], COSTS, (0.05, 2)),
        # and the other way round none is
        (
            [(0.1, True), (0.6, False), (0.8, False), (0.9, True)],
            {"miss": 1, "false-alarm": 50},
            (0.85, 1),
        ),
        # a defective image without boxes is missed at any threshold
        ([(NONE, True), (0.4, True), (0.3, False)], COSTS, (0.35, 50)),
        # of two equally wide intervals the higher: (0, 0.25] and (0.75, 1] both cost 1
        ([(0.25, True), (0.75, False)], {"miss": 1, "false-alarm": 1}, (0.875, 1)),
        ([], COSTS, (0.5, 0)),
    ],
)
def test_the_cheapest_threshold(
    images: list[tuple[float, bool]], costs: dict[str, float], expected: tuple[float, float]
) -> None:
    assert cheapest_threshold(*arrays(*images), costs) == pytest.approx(expected)


score = st.one_of(st.just(NONE), st.integers(0, 20).map(lambda n: n / 20))


@given(
    st.lists(st.tuples(score, st.booleans()), max_size=12),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_no_threshold_is_cheaper(
    images: list[tuple[float, bool]], miss: int, false_alarm: int
) -> None:
    threshold, cost = cheapest_threshold(
        *arrays(*images), {"miss": miss, "false-alarm": false_alarm}
    )

    def paid(at: float) -> float:
        misses = sum(defective and not s >= at for s, defective in images)
        alarms = sum(not defective and s >= at for s, defective in images)
        return miss * misses + false_alarm * alarms

    assert paid(threshold) == cost
    assert cost == min(paid(n / 200) for n in range(1, 201))


def config(**changes: object) -> EvaluateConfig:
    return build(EvaluateConfig, {"data": "d", "predictions": "p", "out": "o", **changes})


def test_costs_are_given_as_text_or_as_keys_and_values() -> None:
    assert config(cost="miss=50,false-alarm=1").cost == COSTS
    assert config(cost={"miss": 50, "false-alarm": 1}).cost == COSTS
    assert config().cost is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("miss=50", "expected miss=COST,false-alarm=COST, found {'miss': '50'}"),
        ("mis=50,false-alarm=1", "expected miss=COST,false-alarm=COST, found {"),
        ("miss=much,false-alarm=1", "expected miss=COST,false-alarm=COST with numbers, found {"),
        ("miss=-1,false-alarm=1", "of 0 or more, and not both 0, found {"),
        ("miss=0,false-alarm=0", "of 0 or more, and not both 0, found {"),
        ("miss=nan,false-alarm=1", "of 0 or more, and not both 0, found {"),
    ],
)
def test_costs_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--data", "d", "--predictions", "p", "--out", "o", "--cost", text])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipeline evaluate: --cost: expected miss=COST,false-alarm=COST")
    assert problem in line


def test_costs_beside_a_threshold() -> None:
    with pytest.raises(UserError, match="--cost: expected no --threshold beside it"):
        config(cost="miss=1,false-alarm=1", threshold=0.5)
