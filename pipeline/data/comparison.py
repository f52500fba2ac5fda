"""Any number of runs in one table: every run is measured on the same images, by the same code.

comparison.json. Null stands for a figure that the data or the kind of run do not define, and for a
time that is not known.

    split, fold                     name; number, `all` or null
    images, defective, resamples    counts
    rows[].run, .method, .label     its path as given, its name, and that name made unique
        .needs                      the truth it learns from: `good images`, `labels`, `boxes`,
            `masks`
        .image_auroc, .average_precision   of the images' scores, good against defective
        .recall, .false_alarm_rate  parts of the defective and of the good images that score at
            least the threshold with the best F1 on val
        .pixel_auroc, .pro          see pipeline/data/anomaly.py
        .pixel_iou                  of all pixels that score at least the threshold with the best
            IoU on val
        .accuracy, .balanced_accuracy, .macro_f1   of the image decision, see
            pipeline/data/decision.py
        .map50                      of the boxes
        .mask_iou                   mean over all true instances, 0 for those that are missed
        .training_seconds           of one training, or of those of detector and segmenter
        .inference_seconds_per_image
        .intervals.<key>            [low, high], 95 %, of the keys in `HEADLINE`
        .gain.<key>.value, .interval   the figure less that of the first run, and [low, high], 95 %,
            of the same resamples for both runs; of the keys in `HEADLINE` that both have
        .per_fold[].fold and all keys up to `pixel_iou`, and the seconds; null unless all folds

Of all folds, what ranks or cuts scores, that is all keys up to `pixel_iou`, is the mean over the
folds, whose models' scores have scales of their own (Forman & Scholz, Apples-to-apples in
cross-validation studies, SIGKDD Explorations 12(1), 2010); so are the seconds, where they are
known. Decisions, boxes and masks are of all images together, each with the models and the threshold
of its fold: what `pipeline evaluate --predictions` says of them. A resample draws the images of
each fold by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.data import anomaly, metrics, report
from pipeline.data.anomaly import PixelScores
from pipeline.data.dataset import Sample
from pipeline.data.decision import confusion_matrix, decision_scores
from pipeline.data.report import Table
from pipeline.data.runs import Answers

TITLES = {  # of the figures in tables, by their keys
    "image_auroc": "image AUROC",
    "average_precision": "AP",
    "pixel_auroc": "pixel AUROC",
    "pro": "PRO",
    "pixel_iou": "pixel IoU",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "map50": "box mAP50",
    "mask_iou": "mask IoU",
    "training_seconds": "training, s",
    "inference_seconds_per_image": "s per image",
}
HEADLINE = (  # with intervals
    "image_auroc",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "map50",
    "mask_iou",
)


@dataclass(frozen=True)
class Part:
    """The images that are measured together: of the split, or of a fold."""

    fold: int | None
    samples: Sequence[Sample]
    val: Sequence[Sample]  # that thresholds are chosen on


@dataclass(frozen=True)
class Row:
    """One run, measured."""

    figures: dict[str, Any]
    drawn: Mapping[str, np.ndarray]  # of `HEADLINE`: each figure of each resample


def rows(measured: Sequence[Row]) -> list[dict[str, Any]]:
    """The figures of all runs, with names that tell them apart, and their gains over the first."""
    count = Counter(its.figures["method"] for its in measured)
    return [
        {
            **its.figures,
            "gain": _gain(its, measured[0]) if k else {},
            "label": its.figures["method"]
            if count[its.figures["method"]] == 1
            else f"{its.figures['method']} ({its.figures['run']})",
        }
        for k, its in enumerate(measured)
    ]


def _gain(row: Row, first: Row) -> dict[str, dict[str, Any]]:
    keys = [key for key in HEADLINE if None not in (row.figures[key], first.figures[key])]
    drawn = {key: row.drawn[key] - first.drawn[key] for key in keys}
    found = _intervals(drawn)
    return {
        key: {
            "value": round(row.figures[key] - first.figures[key], 6),
            "interval": found.get(key),
        }
        for key in keys
    }


def row(
    run: Path,
    answers: Sequence[Answers],
    parts: Sequence[Part],
    classes: Sequence[str],
    resamples: int,
    seed: int,
) -> Row:
    """Measure one run, with its answers for each part. The same seed draws the same images."""
    counts = [
        metrics.draw_resamples(len(p.samples), resamples, seed + k) for k, p in enumerate(parts)
    ]
    per_fold = [_scores(its, part) for its, part in zip(answers, parts, strict=True)]
    drawn = {"image_auroc": _resampled_auroc(answers, parts, counts)}
    together = [sample for part in parts for sample in part.samples]
    everything = np.hstack(counts)
    decided, drawn_decisions = _decisions(answers, together, classes, everything)
    localised, drawn_localised = _localisation(answers, parts, classes, everything)
    drawn |= drawn_decisions | drawn_localised
    figures = {
        "run": str(run),
        "method": answers[0].method,
        "needs": answers[0].needs,
        **{key: _mean([fold[key] for fold in per_fold]) for key in per_fold[0]},
        **decided,
        **localised,
        **_seconds(answers),
        "intervals": _intervals(drawn),
        "per_fold": [
            {"fold": part.fold, **fold, **_seconds([its])}
            for part, fold, its in zip(parts, per_fold, answers, strict=True)
        ]
        if len(parts) > 1
        else None,
    }
    return Row(figures, drawn)


def _scores(answers: Answers, part: Part) -> dict[str, float | None]:
    """What the scores of images and pixels are worth."""
    seen = all(sample.image_id in answers.scores for sample in part.val)
    samples = {"val": part.val if seen else (), "test": part.samples}
    scores = {k: _image_scores(answers, its) for k, its in samples.items()}
    defective = {k: _defective(its) for k, its in samples.items()}
    images = anomaly.image_figures(scores, defective)
    pixels: Mapping[str, float | None] = dict.fromkeys(("auroc", "pro", "iou"))
    if answers.pixels is not None:
        counted = {k: PixelScores(answers.pixels.low, answers.pixels.high) for k in samples}
        for k, its in samples.items():
            for sample in its:
                counted[k].add(answers.pixels.of(sample), sample.defect())
        pixels = anomaly.pixel_figures(counted)
    return {
        "image_auroc": images["auroc"],
        "average_precision": images["average_precision"],
        "recall": images["recall"],
        "false_alarm_rate": images["false_alarm_rate"],
        "pixel_auroc": pixels["auroc"],
        "pro": pixels["pro"],
        "pixel_iou": pixels["iou"],
    }


def _image_scores(answers: Answers, samples: Sequence[Sample]) -> np.ndarray:
    return np.array([answers.scores[sample.image_id] for sample in samples], float)


def _defective(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.label >= 0 for sample in samples], bool)


def _resampled_auroc(
    answers: Sequence[Answers], parts: Sequence[Part], counts: Sequence[np.ndarray]
) -> np.ndarray:
    of_parts = [
        anomaly.resampled_image_auroc(
            _image_scores(its, part.samples), _defective(part.samples), drawn
        )
        for its, part, drawn in zip(answers, parts, counts, strict=True)
    ]
    return metrics.nanmean(np.stack(of_parts, axis=1))


def _decisions(
    answers: Sequence[Answers],
    samples: Sequence[Sample],
    classes: Sequence[str],
    counts: np.ndarray,
) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
    """The figures of the image decision, and the same of the resamples."""
    known = [its.decisions for its in answers if its.decisions is not None]
    if not known:
        return dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1")), {}
    labels = np.array([sample.label + 1 for sample in samples])
    decided = np.concatenate(known)
    scores = decision_scores(confusion_matrix(labels, decided, len(classes) + 1))
    drawn = decision_scores(confusion_matrix(labels, decided, len(classes) + 1, counts))
    return {
        "accuracy": anomaly.number(scores.accuracy),
        "balanced_accuracy": anomaly.number(scores.balanced_accuracy),
        "macro_f1": anomaly.number(scores.macro_f1),
    }, {
        "accuracy": drawn.accuracy,
        "balanced_accuracy": drawn.balanced_accuracy,
        "macro_f1": drawn.macro_f1,
    }


def _localisation(
    answers: Sequence[Answers],
    parts: Sequence[Part],
    classes: Sequence[str],
    counts: np.ndarray,
) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
    """The figures of boxes and masks, and the same of the resamples."""
    found: dict[str, float | None] = dict.fromkeys(("map50", "mask_iou"))
    if any(its.predictions is None for its in answers):
        return found, {}
    samples, results, images = [], {}, []
    for its, part in zip(answers, parts, strict=True):
        assert its.predictions is not None and its.threshold is not None
        for sample in part.samples:
            samples.append(sample)
            results[sample.image_id] = its.predictions.results.get(sample.image_id, [])
            kept = its.predictions.of(sample, its.threshold)
            images.append(metrics.measure_image(sample.truth, kept, len(classes)))
    boxes = metrics.coco_evaluation(samples, results, len(classes), "bbox")
    ap = metrics.average_precisions(boxes)
    found["map50"] = anomaly.number(metrics.mean_average_precisions(ap)[0])
    drawn = metrics.resampled_average_precisions(boxes, counts)
    resampled = {"map50": metrics.mean_average_precisions(drawn)[0]}
    if all(its.pixels is not None for its in answers):
        ious = np.array([image.iou.sum() for image in images])
        truths = np.array([len(image.iou) for image in images])
        every = np.ones((1, len(images)), int)
        found["mask_iou"] = anomaly.number(metrics.ratio(every, ious, truths)[0])
        resampled["mask_iou"] = metrics.ratio(counts, ious, truths)
    return found, resampled


def _seconds(answers: Sequence[Answers]) -> dict[str, float | None]:
    return {
        "training_seconds": _mean([its.training_seconds for its in answers]),
        "inference_seconds_per_image": _mean([its.seconds_per_image for its in answers]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what is known."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 6) if known else None


def _intervals(drawn: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    found = {key: metrics.percentile_interval(values) for key, values in drawn.items()}
    return {
        key: [round(low, 6), round(high, 6)]
        for key, (low, high) in found.items()
        if not np.isnan(low)
    }


# ---- For people --------------------------------------------------------------------------------


def figures_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each run; figures that no run has are left out."""
    keys = [key for key in TITLES if any(its.get(key) is not None for its in rows)]
    lines = [
        [its["label"], its["needs"], *(_cell(key, its.get(key)) for key in keys)] for its in rows
    ]
    return Table(title, ["method", "needs", *(TITLES[key] for key in keys)], lines)


def intervals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The intervals of the headline figures."""
    keys = [key for key in HEADLINE if any(key in its["intervals"] for its in rows)]
    lines = [[its["label"], *(_range(its["intervals"].get(key)) for key in keys)] for its in rows]
    return Table("95 % intervals", ["method", *(TITLES[key] for key in keys)], lines)


def gains_table(first: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """How far the rows are ahead of the run `first`, with intervals of the differences."""
    keys = [key for key in HEADLINE if any(key in its["gain"] for its in rows)]
    lines = [[its["label"], *(_change(its["gain"].get(key)) for key in keys)] for its in rows]
    return Table(f"Gain over {first}", ["method", *(TITLES[key] for key in keys)], lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "training_seconds":
        return f"{value:.0f}"
    return f"{value:.2f}" if key == "inference_seconds_per_image" else f"{value:.3f}"


def _range(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _change(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return "–"
    interval = gain["interval"]
    return f"{gain['value']:+.2f}" + ("" if interval is None else f" ({_range(interval)})")


def markdown(values: Mapping[str, Any]) -> str:
    """The tables of comparison.json, and what a reader must know to read them."""
    parts = [f"# {_title(values)}", *notes(values)]
    for table in _tables(values):
        parts += [f"## {table.title}", report.markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def show(values: Mapping[str, Any]) -> None:
    """Print the tables to the terminal."""
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # better lines that wrap than figures that do
    report.show_tables(console, [_narrow(table) for table in _tables(values)])
    for note in notes(values):
        console.print(note, markup=False, soft_wrap=True)


def _narrow(table: Table) -> Table:
    """With the words of its header below one another."""
    return Table(table.title, [title.replace(" ", "\n") for title in table.header], table.rows)


def notes(values: Mapping[str, Any]) -> list[str]:
    """What a reader must know to read the tables."""
    lines = [
        f"{values['images']} images, {values['images'] - values['defective']} of them good. "
        "Thresholds, of pixel IoU too, are chosen on the val split. A dash: not defined for this "
        "kind of run, or not known.",
    ]
    if values["fold"] == "all":
        lines.append(
            "Every image is measured with the models of the one fold that did not train on it. "
            "What ranks or cuts scores (AUROC, AP, PRO, pixel IoU) is the mean over the folds; "
            "accuracy, mAP50 and mask IoU are of all images together."
        )
    lines.append(
        "Seconds are wall clock where and when the run was made; weights that came ready cost none."
    )
    if values["resamples"]:
        lines.append(
            f"Intervals: percentile bootstrap, {values['resamples']} resamples of the images; of a "
            "gain, the same images for both runs."
        )
    return lines


def _title(values: Mapping[str, Any]) -> str:
    of = "all folds" if values["fold"] == "all" else f"the {values['split']} split"
    return f"Comparison of {len(values['rows'])} runs on {of}"


def _tables(values: Mapping[str, Any]) -> list[Table]:
    rows = values["rows"]
    tables = [figures_table("Figures", rows)]
    tables += [intervals_table(rows)] * bool(values["resamples"])
    compared = [its for its in rows if its["gain"]]
    return tables + [gains_table(rows[0]["label"], compared)] * bool(compared)
