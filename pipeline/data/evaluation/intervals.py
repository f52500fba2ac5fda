"""Bootstrap intervals of the headline figures: the images are drawn anew, with replacement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools.cocoeval import COCOeval

from pipeline.data import metrics, unknown
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.evaluation.figures import FALSE_ALARM_RATE
from pipeline.data.evaluation.measured import Measured, Review


def intervals(measured: Measured, resamples: int, seed: int) -> dict[str, list[float]]:
    """95 % intervals [low, high] of the headline figures, by dotted key."""
    if not resamples:
        return {}
    counts = metrics.draw_resamples(len(measured.samples), resamples, seed)
    drawn = {
        **_resampled_ap("box", measured.boxes, counts, measured.classes),
        **(
            {}
            if measured.masks is None
            else _resampled_ap("mask", measured.masks, counts, measured.classes)
        ),
        **_resampled_means(measured, counts),
        **_resampled_decisions(measured, counts),
        **({} if measured.review is None else _resampled_review(measured.review, counts)),
        **_resampled_unknown(measured, counts),
    }
    found = {key: metrics.percentile_interval(values) for key, values in drawn.items()}
    return {
        key: [round(low, 6), round(high, 6)]
        for key, (low, high) in found.items()
        if not np.isnan(low)
    }


def _resampled_ap(
    group: str, evaluation: COCOeval, counts: np.ndarray, classes: Sequence[str]
) -> dict[str, np.ndarray]:
    ap = metrics.resampled_average_precisions(evaluation, counts)
    map50, map50_95 = metrics.mean_average_precisions(ap)
    found = {f"{group}.map50": map50, f"{group}.map50_95": map50_95}
    for k, name in enumerate(classes):
        found[f"{group}.ap50_per_class.{name}"] = ap[:, 0, k]
        found[f"{group}.ap_per_class.{name}"] = ap[:, :, k].mean(axis=1)
    return found


def _resampled_means(measured: Measured, counts: np.ndarray) -> dict[str, np.ndarray]:
    images = measured.images
    truths = [len(image.matched) for image in images]
    good = measured.labels == 0
    alarms = [image.boxes for image in images] * good
    recall, _ = metrics.recall_at_false_alarms(measured.finds, good, FALSE_ALARM_RATE, counts)
    found = {
        "good_images.false_alarms_per_image": metrics.ratio(counts, alarms, good),
        "recall_at_false_alarms.recall": recall,
    }
    if measured.masks is not None:
        ious = [image.iou.sum() for image in images]
        matched = [image.matched.sum() for image in images]
        found["mask.mean_iou_matched"] = metrics.ratio(counts, ious, matched)
        found["mask.mean_iou_all"] = metrics.ratio(counts, ious, truths)
    if measured.true_boxes is not None:
        ious = [overlaps[0].sum() for overlaps in measured.true_boxes]
        found["truth_boxes.mean_iou"] = metrics.ratio(counts, ious, truths)
    return found


def _resampled_review(review: Review, counts: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name, judged in review.judged.items():
        of_mask = counts[:, judged.image]  # a mask is drawn as often as its image
        listed, bad = review.listed(judged), judged.bad
        every, errors = np.ones(len(bad)), np.abs(judged.quality - judged.iou)
        key = f"review.{name}"
        found[f"{key}.share_listed"] = metrics.ratio(of_mask, listed, every)
        found[f"{key}.share_caught"] = metrics.ratio(of_mask, listed & bad, bad)
        found[f"{key}.mean_absolute_error"] = metrics.ratio(of_mask, errors, every)
    return found


def _resampled_decisions(measured: Measured, counts: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name, decided in measured.decisions.items():
        confusion = confusion_matrix(measured.labels, decided, len(measured.classes) + 1, counts)
        scores = decision_scores(confusion)
        found[f"image_decision.{name}.accuracy"] = scores.accuracy
        found[f"image_decision.{name}.balanced_accuracy"] = scores.balanced_accuracy
        found[f"image_decision.{name}.macro_f1"] = scores.macro_f1
    return found


def _resampled_unknown(measured: Measured, counts: np.ndarray) -> dict[str, np.ndarray]:
    if measured.unknown is None:
        return {}
    rates = unknown.rates(measured.unknown, measured.classes, counts)
    return {".".join(("unknown", *keys)): values for keys, values in rates.items()}
