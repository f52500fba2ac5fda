from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from detections import detections
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data import metrics
from pipeline.data.dataset import Sample
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.matching import match, verdict

SIDE = 80


# Matching and verdicts


@pytest.mark.parametrize(
    ("truth", "predicted", "pairs"),
    [
        ([], [], []),
        ([(0, 0, 10, 10, 0)], [], []),
        ([], [(0, 0, 10, 10, 0, 0.9)], []),
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 10, 0, 0.9)], [(0, 0)]),
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 10, 1, 0.9)], []),  # another class
        # half-open boxes: 10x10 and 10x5 have an IoU of exactly 0.5, and 10x4 has 0.4
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 5, 0, 0.9)], [(0, 0)]),
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 4, 0, 0.9)], []),
        # the higher score takes the truth, even with less overlap
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 10, 0, 0.5), (0, 0, 10, 8, 0, 0.9)], [(0, 1)]),
        # of equal scores the first
        ([(0, 0, 10, 10, 0)], [(0, 0, 10, 8, 0, 0.9), (0, 0, 10, 10, 0, 0.9)], [(0, 0)]),
        # each takes the truth that it overlaps most, if it is free
        (
            [(0, 0, 10, 10, 0), (0, 2, 10, 12, 0)],
            [(0, 2, 10, 12, 0, 0.9), (0, 2, 10, 12, 0, 0.8)],
            [(1, 0), (0, 1)],
        ),
    ],
)
def test_match(truth: list[Any], predicted: list[Any], pairs: list[tuple[int, int]]) -> None:
    assert match(detections(*truth), detections(*predicted)) == pairs


A, B = (0, 0, 10, 10), (40, 40, 60, 60)


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ([], [], "correct"),
        ([], [(*A, 0, 0.9)], "false alarm"),
        ([(*A, 0)], [], "miss"),
        ([(*A, 0)], [(*B, 0, 0.9)], "miss"),
        ([(*A, 0)], [(*A, 0, 0.9)], "hit"),
        ([(*A, 0)], [(*A, 1, 0.9)], "wrong class"),
        ([(*A, 0)], [(*A, 1, 0.9), (*A, 0, 0.5)], "false alarm"),  # found, and a box too many
        ([(*A, 0)], [(*A, 0, 0.9), (*B, 0, 0.5)], "false alarm"),
        ([(*A, 0), (*B, 1)], [(*A, 0, 0.9)], "miss"),
        ([(*A, 0), (*B, 1)], [(*A, 0, 0.9), (*B, 1, 0.9)], "hit"),
        ([(*A, 0), (*B, 1)], [(*A, 0, 0.9), (*B, 0, 0.9)], "wrong class"),
        ([(*A, 0), (*B, 1)], [(*A, 1, 0.9)], "miss"),  # the worst kind of error counts
    ],
)
def test_verdict(truth: list[Any], predicted: list[Any], expected: str) -> None:
    assert verdict(detections(*truth), detections(*predicted)) == expected


# Average precision


def rle(box: list[int]) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return coco_mask.encode(mask)


def random_case(
    seed: int, images: int = 30, classes: int = 3
) -> tuple[list[Sample], dict[int, list[dict[str, Any]]]]:
    """Images with 0 to 2 instances, and predictions: near ones, of a wrong class, and strays."""
    rng = np.random.default_rng(seed)
    samples, results = [], {}
    number = 0
    for image_id in range(5, 5 + images):
        annotations: list[dict[str, Any]] = []
        predicted: list[dict[str, Any]] = []
        for _ in range(rng.integers(0, 3)):
            box = [int(v) for v in (*rng.integers(0, 40, 2), *rng.integers(15, 35, 2))]
            category = int(rng.integers(1, classes + 1))
            number += 1
            annotations.append(
                {
                    "id": number, "image_id": image_id, "category_id": category, "bbox": box,
                    "area": box[2] * box[3], "segmentation": rle(box), "iscrowd": 0,
                }
            )  # fmt: skip
            for _ in range(rng.integers(0, 3)):
                near = [max(0, v + int(rng.integers(-3, 4))) for v in box]
                other = int(rng.integers(1, classes + 1)) if rng.random() < 0.2 else category
                predicted.append({"category_id": other, "bbox": near})
        for _ in range(rng.integers(0, 2)):
            stray = [int(v) for v in (*rng.integers(0, 40, 2), *rng.integers(10, 30, 2))]
            predicted.append({"category_id": int(rng.integers(1, classes + 1)), "bbox": stray})
        results[image_id] = [
            {
                **p,
                "image_id": image_id,
                "score": float(rng.random()),
                "segmentation": rle(p["bbox"]),
            }
            for p in predicted
        ]
        samples.append(Sample(image_id, Path(f"{image_id}.png"), SIDE, SIDE, tuple(annotations)))
    return samples, results


def reference(
    samples: list[Sample],
    results: dict[int, list[dict[str, Any]]],
    counts: np.ndarray,
    classes: int,
    kind: str,
) -> np.ndarray:
    """pycocotools' usual route, `loadRes` and `summarize`, on images that are really repeated."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for sample, count in zip(samples, counts, strict=True):
        for _ in range(count):
            image_id = len(images) + 1
            images.append({"id": image_id, "height": SIDE, "width": SIDE})
            for a in sample.annotations:
                annotations.append({**a, "id": len(annotations) + 1, "image_id": image_id})
            found += [{**e, "image_id": image_id} for e in results[sample.image_id]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k} for k in range(1, classes + 1)],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[[1, 0]]  # mAP50, mAP50-95


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_is_that_of_pycocotools(seed: int, kind: Any) -> None:
    samples, results = random_case(seed)
    evaluation = metrics.coco_evaluation(samples, results, 3, kind)
    ap = metrics.average_precisions(evaluation)
    expected = reference(samples, results, np.ones(len(samples), int), 3, kind)
    assert 0.05 < expected[1] < expected[0] < 0.95  # a case that can tell
    np.testing.assert_allclose(metrics.mean_average_precisions(ap), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_resamples_equal_an_evaluation_of_repeated_images(kind: Any) -> None:
    samples, results = random_case(2)
    evaluation = metrics.coco_evaluation(samples, results, 3, kind)
    counts = metrics.draw_resamples(len(samples), 5, seed=3)
    ap = metrics.resampled_average_precisions(evaluation, counts)
    found = np.stack(metrics.mean_average_precisions(ap), axis=1)
    expected = [reference(samples, results, row, 3, kind) for row in counts]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert len(np.unique(found)) == found.size
    # the evaluation itself is as before
    np.testing.assert_array_equal(
        metrics.resampled_average_precisions(evaluation, np.ones((1, len(samples)), int))[0],
        metrics.average_precisions(evaluation),
    )


def test_a_resample_without_the_only_true_instance_is_undefined() -> None:
    box = [5, 5, 20, 20]
    truth = {"id": 0, "category_id": 1, "bbox": box, "area": 400, "segmentation": rle(box)}
    samples = [
        Sample(1, Path("1.png"), SIDE, SIDE, (truth,)),
        Sample(2, Path("2.png"), SIDE, SIDE, ()),
    ]
    results = {1: [{"category_id": 1, "bbox": box, "score": 0.9}]}
    evaluation = metrics.coco_evaluation(samples, results, 1, "bbox")
    ap = metrics.resampled_average_precisions(evaluation, np.array([[2, 0], [0, 2], [1, 1]]))
    map50, map50_95 = metrics.mean_average_precisions(ap)
    np.testing.assert_allclose(map50, [1, np.nan, 1])
    np.testing.assert_allclose(map50_95, [1, np.nan, 1])
    assert metrics.percentile_interval(map50) == pytest.approx((1, 1))


def test_equal_scores_on_different_images_keep_the_order_of_the_images() -> None:
    box = [5, 5, 20, 20]
    truth = {"id": 1, "category_id": 1, "bbox": box, "area": 400, "segmentation": rle(box)}
    entry = {"category_id": 1, "bbox": box, "score": 0.5}
    hit, alarm = (truth,), ()
    for order, expected in (((hit, alarm), 1.0), ((alarm, hit), 0.5)):
        samples = [Sample(i, Path("a.png"), SIDE, SIDE, t) for i, t in enumerate(order)]
        evaluation = metrics.coco_evaluation(samples, {0: [entry], 1: [entry]}, 1, "bbox")
        assert metrics.average_precisions(evaluation)[0, 0] == pytest.approx(expected)


# One image


def with_masks(found: sv.Detections, masks: list[np.ndarray]) -> sv.Detections:
    found.mask = np.stack(masks)
    return found


def test_measure_image_compares_masks_of_matched_pairs_and_pixels_of_classes() -> None:
    def rows(*span: int) -> np.ndarray:
        mask = np.zeros((20, 10), bool)
        mask[slice(*span)] = True
        return mask

    truth = with_masks(detections((0, 0, 10, 4, 0), (0, 10, 10, 14, 0)), [rows(0, 4), rows(10, 14)])
    predicted = with_masks(
        detections((0, 0, 10, 4, 0, 0.4), (0, 0, 10, 4, 1, 0.9)), [rows(1, 5), rows(0, 2)]
    )
    result = metrics.measure_image(truth, predicted, 3)
    np.testing.assert_array_equal(result.matched, [True, False])
    np.testing.assert_allclose(result.iou, [3 / 5, 0])
    np.testing.assert_allclose(result.dice, [6 / 8, 0])
    np.testing.assert_array_equal(result.pixels, [[30, 90], [0, 20], [0, 0]])
    assert (result.decision, result.boxes, result.verdict) == (1, 2, "miss")


def test_measure_image_of_a_good_image_without_boxes() -> None:
    result = metrics.measure_image(sv.Detections.empty(), sv.Detections.empty(), 2)
    assert (result.decision, result.boxes, result.verdict) == (-1, 0, "correct")
    assert result.iou.shape == (0,)
    assert not result.pixels.any()


# Threshold


@pytest.mark.parametrize(
    ("scores", "hit", "truths", "expected"),
    [
        ([], [], 3, None),
        ([0.9, 0.8], [False, False], 1, None),
        ([0.8], [True], 1, (0.4, 1.0)),
        # midway between the last hit and the first false alarm
        ([0.9, 0.7, 0.3, 0.2], [True, True, False, False], 2, (0.5, 1.0)),
        # 0.9: F1 2/3; 0.6: 2/4; 0.5: 4/5, down to 0.1
        ([0.9, 0.6, 0.5, 0.1], [True, False, True, False], 2, (0.3, 0.8)),
        # equally good at both ends: the wider interval, here (0, 0.2], there (0.5, 0.9]
        ([0.9, 0.8, 0.5, 0.2], [True, False, False, True], 2, (0.1, 2 / 3)),
        ([0.9, 0.5, 0.4, 0.3], [True, False, False, True], 2, (0.7, 2 / 3)),
        # equal scores go together: F1 is 2/3 at 0.5, whatever their order
        ([0.5, 0.5], [False, True], 1, (0.25, 2 / 3)),
    ],
)
def test_best_threshold(
    scores: list[float], hit: list[bool], truths: int, expected: tuple[float, float] | None
) -> None:
    found = metrics.best_threshold(np.array(scores), np.array(hit, bool), truths)
    assert found == (expected if expected is None else pytest.approx(expected))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_no_threshold_has_a_better_f1(pairs: list[tuple[int, bool]], missed: int) -> None:
    scores = np.array([score for score, _ in pairs]) / 10
    hit = np.array([h for _, h in pairs])
    truths = int(hit.sum()) + missed
    found = metrics.best_threshold(scores, hit, truths)
    if found is None:
        assert not hit.any()
        return

    def f1(threshold: float) -> float:
        true = sum(h for s, h in zip(scores, hit, strict=True) if s >= threshold)
        false = sum(not h for s, h in zip(scores, hit, strict=True) if s >= threshold)
        precision, recall = true / max(true + false, 1), true / truths
        return 2 * precision * recall / (precision + recall) if true else 0.0

    best = max(f1(t) for t in np.arange(0.025, 1, 0.05))
    assert f1(found[0]) == pytest.approx(found[1]) == pytest.approx(best)


# Bootstrap


def test_resamples_draw_as_many_images_with_replacement() -> None:
    counts = metrics.draw_resamples(30, 2000, seed=0)
    assert counts.shape == (2000, 30)
    assert (counts.sum(axis=1) == 30).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.12)
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 30) ** 30, abs=0.01)
    np.testing.assert_array_equal(counts, metrics.draw_resamples(30, 2000, seed=0))
    assert (counts != metrics.draw_resamples(30, 2000, seed=1)).any()


def test_interval_of_a_mean_is_that_of_theory_and_shrinks_with_n() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (50, 200, 800):
        values = rng.normal(5, 2, n)
        counts = metrics.draw_resamples(n, 2000, seed=0)
        low, high = metrics.percentile_interval(metrics.ratio(counts, values, np.ones(n)))
        assert low < values.mean() < high
        widths.append(high - low)
        assert widths[-1] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(n), rel=0.1)
    assert widths[0] > widths[1] > widths[2]


def test_ratio_is_undefined_where_nothing_is_drawn() -> None:
    counts = np.array([[1, 1], [2, 0], [0, 2]])
    np.testing.assert_array_equal(metrics.ratio(counts, [3, 0], [2, 0]), [1.5, 1.5, np.nan])


def test_percentile_interval_leaves_undefined_resamples_out() -> None:
    assert metrics.percentile_interval(np.array([1.0, np.nan, 1.0])) == (1, 1)
    assert np.isnan(metrics.percentile_interval(np.array([np.nan]))).all()


# Image decision


def test_decision_scores_of_a_case_worked_out_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    decisions = np.array([0, 0, 0, 1, 1, 0, 3])
    confusion = confusion_matrix(labels, decisions, 5)
    expected = np.zeros((5, 5))
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 0], expected[2, 3] = 3, 1, 1, 1, 1
    np.testing.assert_array_equal(confusion, expected)
    scores = decision_scores(confusion)
    assert scores.accuracy == pytest.approx(4 / 7)
    np.testing.assert_allclose(scores.recall, [3 / 4, 1 / 2, 0, np.nan, np.nan])
    assert scores.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    # F1 of 0: 6/8; of 1: 2/4; of 2 (never decided for) and 3 (never true): 0; of 4: undefined
    assert scores.macro_f1 == pytest.approx((6 / 8 + 2 / 4 + 0 + 0) / 4)


def test_always_good_scores_its_share() -> None:
    labels = np.repeat(np.arange(5), [273, 10, 10, 10, 10])
    scores = decision_scores(confusion_matrix(labels, np.zeros_like(labels), 5))
    assert scores.accuracy == pytest.approx(0.872, abs=5e-4)
    assert scores.balanced_accuracy == pytest.approx(0.2)


def test_resampled_confusions_are_those_of_the_drawn_images() -> None:
    rng = np.random.default_rng(0)
    labels, decisions = rng.integers(0, 3, (2, 12))
    counts = metrics.draw_resamples(12, 4, seed=0)
    found = confusion_matrix(labels, decisions, 3, counts)
    for row, confusion in zip(counts, found, strict=True):
        expected = np.zeros((3, 3))
        for image, count in enumerate(row):
            expected[labels[image], decisions[image]] += count
        np.testing.assert_array_equal(confusion, expected)
    scores = decision_scores(found)
    assert scores.accuracy.shape == (4,)
    assert scores.recall.shape == (4, 3)
    first = decision_scores(found[0])
    assert scores.macro_f1[0] == first.macro_f1
    assert scores.balanced_accuracy[0] == first.balanced_accuracy


# Recall at a rate of false alarms


def finds(instances: list[tuple[int, float]], alarms: list[tuple[int, float]]) -> metrics.Finds:
    a, b = (np.array(rows, float).reshape(-1, 2) for rows in (instances, alarms))
    return metrics.Finds(a[:, 0].astype(int), a[:, 1], b[:, 0].astype(int), b[:, 1])


@pytest.mark.parametrize(
    ("good", "alarms", "recall", "above"),
    [
        (99, [0.5], 2 / 4, 0.5),  # 99 good images allow none
        (100, [0.5], 3 / 4, -np.inf),  # a hundred allow one
        (100, [0.5, 0.3], 3 / 4, 0.3),  # an instance at 0.35 counts, the second alarm does not
        (100, [0.5, 0.5], 2 / 4, 0.5),  # of equal scores both come or none
        (250, [0.9, 0.8, 0.7, 0.1], 1 / 4, 0.7),
        (1, [], 3 / 4, -np.inf),
    ],
)
def test_recall_at_one_false_alarm_per_hundred_good_images(
    good: int, alarms: list[float], recall: float, above: float
) -> None:
    found = finds(
        [(good, 0.9), (good, 0.6), (good, 0.35), (good, -np.inf)],
        [(i % good, score) for i, score in enumerate(alarms)],
    )
    is_good = np.arange(good + 1) < good
    values = metrics.recall_at_false_alarms(found, is_good, 0.01, np.ones((1, good + 1), int))
    assert [float(v[0]) for v in values] == pytest.approx([recall, above])


def test_recall_at_false_alarms_follows_the_resample() -> None:
    found = finds([(1, 0.9), (2, 0.4)], [(0, 0.5)])
    counts = np.array([[1, 1, 1], [0, 1, 1], [1, 3, 0], [2, 0, 0], [1, 1, 3]])
    recall, _ = metrics.recall_at_false_alarms(found, np.array([True, False, False]), 0.01, counts)
    np.testing.assert_allclose(recall, [0.5, np.nan, 1, np.nan, 0.25])


def test_what_found_an_instance_is_known_whatever_the_threshold() -> None:
    truths = [detections((0, 0, 10, 10, 0), (20, 0, 30, 10, 0)), detections()]
    found = [
        detections((0, 0, 10, 10, 0, 0.25), (0, 0, 10, 9, 0, 0.5), (20, 0, 30, 3, 0, 0.75)),
        detections((0, 0, 10, 10, 0, 0.125)),
    ]
    result = metrics.find(truths, found)
    assert result.instance_images.tolist() == [0, 0]
    assert result.instance_scores.tolist() == [0.5, -np.inf]
    assert (result.alarm_images.tolist(), result.alarm_scores.tolist()) == ([1], [0.125])
