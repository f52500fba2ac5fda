"""Mask quality: its calibration, what is listed for review, and its truth."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rectangles import filled, write_dataset
from scipy.special import expit, logit

from pipeline.config import SegmentConfig
from pipeline.data import quality
from pipeline.data.quality import Calibration, Judged
from pipeline.stages import segment

shares = st.floats(0, 1)
calibrations = st.builds(Calibration, st.floats(0, 20), st.floats(-20, 20))


def some_shares(most: int = 40) -> st.SearchStrategy[np.ndarray]:
    return arrays(float, st.integers(0, most), elements=shares)


@st.composite
def masks_with_iou(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(0, 12))
    predicted, true = (draw(arrays(float, count, elements=shares)) for _ in range(2))
    return predicted, true


def squared_error(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(((predicted - true) ** 2).sum())


# ---- Calibration -----------------------------------------------------------------------------


@given(calibrations, some_shares())
def test_calibrated_quality_is_in_range_and_in_order(
    calibration: Calibration, predicted: np.ndarray
) -> None:
    predicted = np.sort(predicted)
    found = calibration.apply(predicted)
    assert found.shape == predicted.shape
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found) >= 0).all()


@given(some_shares())
def test_the_identity_changes_nothing_that_is_written(predicted: np.ndarray) -> None:
    np.testing.assert_allclose(Calibration().apply(predicted), predicted, atol=1.001e-4)


def test_calibration_is_platt_scaling() -> None:
    # logit(0.8) = ln 4: half of it and ln 2 more is ln 4 again; logit(0.2) = -ln 4 gives 0
    found = Calibration(0.5, np.log(2)).apply(np.array([0.8, 0.2]))
    np.testing.assert_allclose(found, [0.8, 0.5])


@pytest.mark.parametrize(("a", "b"), [(-0.1, 0), (np.nan, 0), (1, np.nan), (np.inf, 0)])
def test_a_calibration_that_would_turn_the_order_is_refused(a: float, b: float) -> None:
    with pytest.raises(ValueError, match="expected finite a >= 0"):
        Calibration(a, b)


@given(masks_with_iou())
def test_fit_is_no_worse_than_the_estimates_as_they_are(
    masks: tuple[np.ndarray, np.ndarray],
) -> None:
    predicted, true = masks
    before = squared_error(Calibration().apply(predicted), true)
    after = squared_error(quality.fit(predicted, true).apply(predicted), true)
    assert after <= before + 1e-9


@pytest.mark.parametrize(("a", "b"), [(0.6, -0.8), (1.8, 0.5), (1, -1.5)])
def test_many_masks_tell_the_distortion(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.05, 0.98, 3000)
    true = np.clip(expit(a * logit(predicted) + b) + rng.normal(0, 0.05, 3000), 0, 1)
    found = quality.fit(predicted, true)
    assert (found.a, found.b) == pytest.approx((a, b), abs=0.08)


def test_few_masks_pull_less_than_many() -> None:
    """Estimates of 0.9 whose masks have an IoU of 0.6: one mask moves them part of the way."""
    moved = [
        float(quality.fit(np.full(n, 0.9), np.full(n, 0.6)).apply(np.array([0.9]))[0])
        for n in (0, 1, 4, 50)
    ]
    assert moved[0] == pytest.approx(0.9)
    assert 0.9 > moved[1] > moved[2] > moved[3]
    assert moved[1] > 0.65  # not taken at its word
    assert moved[3] == pytest.approx(0.6, abs=0.01)


def test_the_slope_of_few_masks_stays_near_one() -> None:
    """Four masks in the wrong order do not turn the scale flat, fifty do."""
    predicted, true = np.array([0.82, 0.84, 0.86, 0.88]), np.array([0.85, 0.8, 0.75, 0.7])
    assert quality.fit(predicted, true).a > 0.5
    assert quality.fit(np.tile(predicted, 50), np.tile(true, 50)).a < 0.2


@pytest.mark.parametrize("predicted", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("true", [0.0, 0.7, 1.0])
def test_constants_can_be_fitted(predicted: float, true: float) -> None:
    found = quality.fit(np.full(20, predicted), np.full(20, true))
    assert found.apply(np.array([predicted]))[0] == pytest.approx(true, abs=0.1)


def test_nothing_gives_the_identity() -> None:
    assert quality.fit(np.array([]), np.array([])) == Calibration(1, 0)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, np.inf])
def test_fit_refuses_what_is_no_iou(bad: float) -> None:
    fine, wrong = np.array([0.5, 0.6]), np.array([0.5, bad])
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        quality.fit(fine, wrong)
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        quality.fit(wrong, fine)
    with pytest.raises(ValueError, match="as many"):
        quality.fit(fine, fine[:1])


# ---- Review ----------------------------------------------------------------------------------


def test_review_list_is_worst_first() -> None:
    entries = [
        {"quality": 0.7, "n": 1},
        {"quality": 0.2, "n": 2},
        {"quality": 0.69, "n": 3},
        {"quality": 0.2, "n": 4},
    ]
    listed = quality.review_list(entries, 0.7)  # one at 0.7 is not under it
    assert [entry["n"] for entry in listed] == [2, 4, 3]
    assert quality.review_list(entries, 0) == []


def test_review_table_names_image_and_class() -> None:
    entry = {"image_id": 7, "category_id": 2, "bbox": [1, 2.5, 3, 4], "score": 0.9, "quality": 0.1}
    images = [{"id": 3, "file_name": "a.png"}, {"id": 7, "file_name": "b, c.png"}]
    text = quality.review_csv([entry], images, ("scratch", "stain"))
    assert list(csv.DictReader(io.StringIO(text))) == [
        {
            "image": "b, c.png", "image_id": "7", "class": "stain", "score": "0.9",
            "quality": "0.1", "bbox_x": "1", "bbox_y": "2.5", "bbox_width": "3", "bbox_height": "4",
        }
    ]  # fmt: skip


def test_segment_lists_masks_for_review(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WidthAsQuality:
        """In place of a SAM: each box, filled; a box of 50 pixels has a quality of 0.5."""

        @classmethod
        def load(cls, source: str, **options: object) -> WidthAsQuality:
            return cls()

        def segment(self, image: np.ndarray, found: sv.Detections, prompt: str) -> sv.Detections:
            boxes = [tuple(map(int, box)) for box in found.xyxy]
            found.mask = np.array([filled(box, *image.shape[:2]) for box in boxes])  # type: ignore[arg-type]
            found.data["quality"] = np.array([(x2 - x1) / 100 for x1, _, x2, _ in boxes])
            return found

    monkeypatch.setattr(segment, "Segmenter", WidthAsQuality)
    defects = [("scratch", (0, 0, 40, 9)), ("stain", (0, 20, 30, 40)), ("stain", (0, 50, 50, 60))]
    source = write_dataset(tmp_path / "data", {"test": (defects,)})
    out = tmp_path / "out"
    options = {"source": source, "out": out, "boxes": "truth", "device": "cpu", "force": True}
    segment.run(SegmentConfig(**options, splits=("test",), review_below=0.5))
    assert f"2 masks under a quality of 0.5: {out / 'review.csv'}" in capsys.readouterr().out
    with (out / "review.csv").open() as file:
        rows = [(row["image"], row["class"], row["quality"]) for row in csv.DictReader(file)]
    assert rows == [("scratch__000.png", "stain", "0.3"), ("scratch__000.png", "scratch", "0.4")]

    segment.run(SegmentConfig(**options, splits=("test",)))
    assert not (out / "review.csv").exists()


# ---- Against the truth -----------------------------------------------------------------------


def detections(*masks: tuple[int, int, int], quality: float = 0.5) -> sv.Detections:
    """(class, first column, end) of masks over the whole height of an image of 4 x 20 pixels."""
    if not masks:
        return sv.Detections.empty()
    pixels = np.zeros((len(masks), 4, 20), bool)
    for mask, (_, start, end) in zip(pixels, masks, strict=True):
        mask[:, start:end] = True
    return sv.Detections(
        xyxy=np.array([[start, 0, end, 4] for _, start, end in masks], float),
        class_id=np.array([cls for cls, _, _ in masks]),
        mask=pixels,
        data={"quality": np.full(len(masks), quality, np.float32)},
    )


def test_iou_is_that_with_the_best_true_mask_of_the_class() -> None:
    truth = detections((0, 0, 4), (0, 4, 12), (1, 12, 20))
    predicted = detections((0, 0, 12), (1, 0, 4), (1, 10, 20), (2, 0, 4), (0, 3, 3))
    # 8 of 12 columns; another class's defect; 8 of 10; a class without truth; no pixel
    np.testing.assert_allclose(quality.best_ious(truth, predicted), [8 / 12, 0, 0.8, 0, 0])


def test_judged_masks_keep_their_image() -> None:
    judged = quality.judge(
        [
            (detections((1, 0, 4)), detections((1, 0, 8), quality=0.7)),
            (detections((1, 0, 4)), detections()),
            (detections(), detections((0, 0, 4), (1, 0, 4), quality=0.75)),
        ]
    )
    assert judged.image.tolist() == [0, 2, 2]
    assert judged.class_id.tolist() == [1, 0, 1]
    assert judged.quality.tolist() == [0.7, 0.75, 0.75]  # 0.7 itself, as it was written
    assert judged.iou.tolist() == [0.5, 0, 0]
    assert judged.bad.tolist() == [False, True, True]  # one at 0.5 is not bad
    assert judged.on_nothing.tolist() == [False, True, True]
    assert judged.mean_absolute_error == pytest.approx((0.2 + 0.75 + 0.75) / 3)
    assert judged.spearman == pytest.approx(-1)


def judged(*masks: tuple[float, float]) -> Judged:
    """Masks of (quality, IoU)."""
    values = np.array(masks, float).reshape(-1, 2)
    zeros = np.zeros(len(values), int)
    return Judged(zeros, zeros, values[:, 0], values[:, 1])


def test_figures_that_nothing_defines_are_nan() -> None:
    assert np.isnan(judged().mean_absolute_error) and np.isnan(judged().spearman)
    assert np.isnan(judged((0.5, 0.4)).spearman)
    assert np.isnan(judged((0.5, 0.4), (0.5, 0.6)).spearman)


def test_review_threshold_lists_every_badly_drawn_mask() -> None:
    masks = ((0.9, 0.8), (0.6, 0.49), (0.3, 0.9), (0.5, 0.1), (0.7, 0.7))
    assert quality.review_threshold(judged(*masks)) == pytest.approx(0.65)
    on_nothing = (0.95, 0)
    assert quality.review_threshold(judged(*masks, on_nothing)) == pytest.approx(0.65)
    assert quality.review_threshold(judged((0.8, 0.4), (0.2, 0.9))) == pytest.approx(0.9)


def test_without_a_badly_drawn_mask_there_is_no_review_threshold() -> None:
    assert quality.review_threshold(judged()) is None
    assert quality.review_threshold(judged((0.4, 0.5), (0.9, 0))) is None


# As networks give them: between two of them there is room for a threshold.
single_precision = st.floats(0, 1, exclude_max=True, width=32)


@given(st.lists(st.tuples(single_precision, shares), max_size=12))
def test_review_threshold_lists_no_more_than_it_must(masks: list[tuple[float, float]]) -> None:
    found = judged(*masks)
    below = quality.review_threshold(found)
    badly_drawn = [q for q, overlap in masks if 0 < overlap < 0.5]
    if below is None:
        assert not badly_drawn
        return
    listed = [q for q, _ in masks if q < below]
    assert set(badly_drawn) <= set(listed)
    assert max(listed) == max(badly_drawn)
