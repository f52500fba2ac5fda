"""The figures of an evaluation, from what was measured image by image, and their intervals.

What each key means is written in pipeline/stages/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from pipeline.data import metrics, unknown
from pipeline.data.box_errors import KINDS
from pipeline.data.dataset import GOOD, Sample
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.matching import VERDICTS, match
from pipeline.data.metrics import Finds, ImageResult
from pipeline.data.predictions import Predictions
from pipeline.data.quality import Judged
from pipeline.data.unknown import Unknown

DEFAULT_THRESHOLD = 0.25  # score from which a box counts, where none can be chosen
FALSE_ALARM_RATE = 0.01  # false alarms per good image at which recall is given


@dataclass(frozen=True)
class Review:
    """Masks that are looked at because of their quality, and how many of the bad ones are."""

    below: float | None  # the quality under which a mask is listed; None: each fold has its own
    of_image: np.ndarray  # (images,) the same, image by image
    reason: str
    predictions: Judged | None  # None: no quality is known
    truth_boxes: Judged | None

    @property
    def judged(self) -> dict[str, Judged]:
        """What is known, by its key in metrics.json."""
        parts = {"predictions": self.predictions, "truth_boxes": self.truth_boxes}
        return {name: judged for name, judged in parts.items() if judged is not None}

    def listed(self, judged: Judged) -> np.ndarray:
        """(n,) which of the masks are listed."""
        return np.asarray(judged.quality < self.of_image[judged.image])


@dataclass(frozen=True)
class Measured:
    """One split, measured. Lists are in the order of `samples`."""

    classes: Sequence[str]
    samples: Sequence[Sample]
    images: Sequence[ImageResult]
    boxes: COCOeval
    masks: COCOeval | None  # None: predictions without masks
    finds: Finds
    true_boxes: Sequence[np.ndarray] | None  # (2, n) IoU and Dice of the masks from n true boxes
    decisions: dict[str, np.ndarray]  # (images,) by model; good is 0, the classes follow
    review: Review | None  # None: masks without quality
    unknown: Unknown | None  # None: no anomaly scores

    @cached_property
    def labels(self) -> np.ndarray:
        """(images,) the true class; good is 0, the classes follow."""
        return np.array([sample.label + 1 for sample in self.samples])

    @cached_property
    def instance_classes(self) -> np.ndarray:
        """(true instances,) class index, in the order of the images."""
        return np.array([a["category_id"] - 1 for s in self.samples for a in s.annotations], int)


def best_threshold(
    samples: Sequence[Sample], predictions: Predictions
) -> tuple[float, float] | None:
    """The score from which boxes have the best F1 of instances at IoU 0.5, and that F1.

    None if no instance is found at any score.
    """
    scores: list[float] = []
    hit: list[bool] = []
    for sample in samples:
        found = {p for _, p in match(sample.truth, predictions.of(sample, masks=False))}
        entries = predictions.results.get(sample.image_id, [])
        scores += [entry["score"] for entry in entries]
        hit += [p in found for p in range(len(entries))]
    truths = sum(len(sample.annotations) for sample in samples)
    return metrics.best_threshold(np.array(scores), np.array(hit, bool), truths)


def figures(measured: Measured) -> dict[str, Any]:
    """Every figure, grouped as in metrics.json; null for what the data do not define."""
    ids, classes = measured.instance_classes, measured.classes
    per_class = {name: int(np.count_nonzero(ids == k)) for k, name in enumerate(classes)}
    verdicts = [image.verdict for image in measured.images]
    masks = measured.masks
    return {
        "images": len(measured.samples),
        "classes": list(classes),
        "instances": len(ids),
        "instances_per_class": per_class,
        "box": _ap(measured.boxes, classes),
        "mask": None if masks is None else {**_ap(masks, classes), **_overlaps(measured)},
        "truth_boxes": None if measured.true_boxes is None else _truth_boxes(measured),
        "review": None if measured.review is None else _review(measured.review),
        "good_images": _good_images(measured),
        "recall_at_false_alarms": _recall_at_false_alarms(measured),
        "errors": {
            kind.replace(" ", "_"): sum(image.errors.count(kind) for image in measured.images)
            for kind in KINDS
        },
        "missed": _missed(measured),
        "verdicts": {name: verdicts.count(name) for name in VERDICTS},
        "image_decision": {
            name: _decision(measured.labels, decided, classes)
            for name, decided in measured.decisions.items()
        },
        "unknown": None
        if measured.unknown is None
        else unknown.figures(measured.unknown, measured.classes),
    }


def mean_ap(evaluation: COCOeval) -> dict[str, float | None]:
    """The means over classes with truth; null without any."""
    map50, map50_95 = metrics.mean_average_precisions(metrics.average_precisions(evaluation))
    return {"map50": _number(map50), "map50_95": _number(map50_95)}


def _ap(evaluation: COCOeval, classes: Sequence[str]) -> dict[str, Any]:
    ap = metrics.average_precisions(evaluation)
    return {
        **mean_ap(evaluation),
        "ap50_per_class": _named(classes, ap[0]),
        "ap_per_class": _named(classes, ap.mean(axis=0)),
    }


def _overlaps(measured: Measured) -> dict[str, Any]:
    ids, classes = measured.instance_classes, measured.classes
    matched = np.concatenate([image.matched for image in measured.images])
    ious = np.concatenate([image.iou for image in measured.images])
    dices = np.concatenate([image.dice for image in measured.images])
    inside, union = np.sum([image.pixels for image in measured.images], axis=0).T
    pixel_ious = [inside[k] / union[k] if k in ids else np.nan for k in range(len(classes))]
    return {
        "mean_iou_matched": _number(metrics.nanmean(ious[matched])),
        "mean_iou_all": _number(metrics.nanmean(ious)),
        "dice_matched": _number(metrics.nanmean(dices[matched])),
        "dice_all": _number(metrics.nanmean(dices)),
        "iou_per_class": _mean_per_class(ious, ids, classes),
        "pixel_iou_per_class": _named(classes, pixel_ious),
    }


def _truth_boxes(measured: Measured) -> dict[str, Any]:
    assert measured.true_boxes is not None
    ious, dices = np.concatenate(measured.true_boxes, axis=1)
    return {
        "mean_iou": _number(metrics.nanmean(ious)),
        "dice": _number(metrics.nanmean(dices)),
        "iou_per_class": _mean_per_class(ious, measured.instance_classes, measured.classes),
    }


def _review(review: Review) -> dict[str, Any]:
    parts: dict[str, Any] = {"predictions": None, "truth_boxes": None}
    for name, judged in review.judged.items():
        listed, bad, on_nothing = review.listed(judged), judged.bad, judged.on_nothing
        parts[name] = {
            "masks": len(listed),
            "listed": int(listed.sum()),
            "bad": int(bad.sum()),
            "caught": int((bad & listed).sum()),
            "on_nothing": int(on_nothing.sum()),
            "on_nothing_caught": int((on_nothing & listed).sum()),
            "share_listed": _number(metrics.nanmean(listed.astype(float))),
            "share_caught": _number(metrics.nanmean(listed[bad].astype(float))),
            "mean_absolute_error": _number(judged.mean_absolute_error),
            "spearman": _number(judged.spearman),
        }
    return {"below": review.below, "reason": review.reason, **parts}


def _good_images(measured: Measured) -> dict[str, Any]:
    boxes = [
        image.boxes
        for sample, image in zip(measured.samples, measured.images, strict=True)
        if sample.label < 0
    ]
    return {
        "count": len(boxes),
        "false_alarms": sum(boxes),
        "with_false_alarms": sum(count > 0 for count in boxes),
        "false_alarms_per_image": _number(sum(boxes) / len(boxes)) if boxes else None,
    }


def _recall_at_false_alarms(measured: Measured) -> dict[str, Any] | None:
    good = measured.labels == 0
    if not good.any():
        return None
    every = np.ones((1, len(good)), int)
    recall, above = metrics.recall_at_false_alarms(measured.finds, good, FALSE_ALARM_RATE, every)
    return {
        "recall": _number(recall[0]),
        "above_score": None if np.isinf(above[0]) else _number(above[0]),
        "false_alarms": int(np.count_nonzero(measured.finds.alarm_scores > above[0])),
    }


def _missed(measured: Measured) -> list[dict[str, Any]]:
    return [
        {
            "image_id": sample.image_id,
            "image": sample.path.name,
            "class": measured.classes[annotation["category_id"] - 1],
            "bbox": annotation["bbox"],
        }
        for sample, image in zip(measured.samples, measured.images, strict=True)
        for annotation, matched in zip(sample.annotations, image.matched, strict=True)
        if not matched
    ]


def _decision(labels: np.ndarray, decided: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    names = (GOOD, *classes)
    confusion = confusion_matrix(labels, decided, len(names))
    scores = decision_scores(confusion)
    return {
        "accuracy": _number(scores.accuracy),
        "balanced_accuracy": _number(scores.balanced_accuracy),
        "macro_f1": _number(scores.macro_f1),
        "recall_per_class": _named(names, scores.recall),
        "confusion": confusion.tolist(),
    }


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


def _mean_per_class(
    values: np.ndarray, ids: np.ndarray, classes: Sequence[str]
) -> dict[str, float | None]:
    return _named(classes, [metrics.nanmean(values[ids == k]) for k in range(len(classes))])


def _named(names: Sequence[str], values: Any) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: Any) -> float | None:
    """A figure as JSON has it: six decimals, null for NaN."""
    return None if np.isnan(value) else round(float(value), 6)
