"""The figures of metrics.json; what each key means is written in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from pipeline.data import costs, metrics, unknown
from pipeline.data.box_errors import KINDS
from pipeline.data.costs import Costs
from pipeline.data.dataset import GOOD
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.evaluation.measured import Measured, Review
from pipeline.data.evaluation.part import Part
from pipeline.data.matching import VERDICTS

FALSE_ALARM_RATE = 0.01  # false alarms per good image at which recall is given


def of_images(measured: Measured) -> dict[str, Any]:
    """What is of all images, grouped as in metrics.json; null for what the data do not define."""
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
        "image_decision": _decisions(measured),
        "unknown": None
        if measured.unknown is None
        else unknown.figures(measured.unknown, measured.classes),
    }


def _mean_ap(evaluation: COCOeval) -> dict[str, float | None]:
    """The means over classes with truth; null without any."""
    map50, map50_95 = metrics.mean_average_precisions(metrics.average_precisions(evaluation))
    return {"map50": _number(map50), "map50_95": _number(map50_95)}


def _ap(evaluation: COCOeval, classes: Sequence[str]) -> dict[str, Any]:
    ap = metrics.average_precisions(evaluation)
    return {
        **_mean_ap(evaluation),
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


def _decisions(measured: Measured) -> dict[str, Any]:
    names = (GOOD, *measured.classes)
    found: dict[str, Any] = {}
    for model, decided in measured.decisions.items():
        confusion = confusion_matrix(measured.labels, decided, len(names))
        scores = decision_scores(confusion)
        found[model] = {
            "accuracy": _number(scores.accuracy),
            "balanced_accuracy": _number(scores.balanced_accuracy),
            "macro_f1": _number(scores.macro_f1),
            "recall_per_class": _named(names, scores.recall),
            "confusion": confusion.tolist(),
        }
    found["majority"]["class"] = names[measured.decisions["majority"][0]]
    return found


# Of each part by itself


def of_costs(cost: Costs, parts: Sequence[Part]) -> dict[str, Any]:
    """What the wrong decisions on the measured images cost."""
    wrong = [
        costs.wrong_decisions(
            costs.image_scores(part.samples, part.predictions.results),
            np.array([sample.label >= 0 for sample in part.samples]),
            part.threshold["value"],
        )
        for part in parts
    ]
    misses, false_alarms = (sum(counts) for counts in zip(*wrong, strict=True))
    total = costs.total(cost, misses, false_alarms)
    return {
        "miss": cost["miss"],
        "false_alarm": cost["false-alarm"],
        "misses": misses,
        "false_alarms": false_alarms,
        "total": round(total, 6),
        "per_image": round(total / sum(len(part.samples) for part in parts), 6),
    }


def of_folds(classes: Sequence[str], parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Each fold by itself."""
    folds = []
    for part in parts:
        results = part.predictions.results
        boxes = metrics.coco_evaluation(part.samples, results, len(classes), "bbox")
        folds.append(
            {
                "fold": part.fold,
                "images": len(part.samples),
                "instances": sum(len(sample.annotations) for sample in part.samples),
                "threshold": part.threshold,
                "review": part.review,
                "anomaly_threshold": None
                if part.anomaly is None
                else unknown.single(np.array([its.threshold for its in part.anomaly])),
                "box": _mean_ap(boxes),
            }
        )
    return folds


# As JSON has them


def _mean_per_class(
    values: np.ndarray, ids: np.ndarray, classes: Sequence[str]
) -> dict[str, float | None]:
    return _named(classes, [metrics.nanmean(values[ids == k]) for k in range(len(classes))])


def _named(names: Sequence[str], values: Any) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: Any) -> float | None:
    """A figure as JSON has it: six decimals, null for NaN."""
    return None if np.isnan(value) else round(float(value), 6)
