"""An evaluation for people: tables of `metrics.json`, as Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.table
from rich.console import Console

from pipeline.data.dataset import GOOD
from pipeline.data.decision import WITH_ANOMALY

Metrics = Mapping[str, Any]  # the content of metrics.json, see docs/metrics.md


KEY_FIGURES = (  # what says most in little room, and the keys it has in metrics.json
    ("box mAP50", ("box", "map50")),
    ("mask mAP50", ("mask", "map50")),
    ("mean mask IoU of found defects", ("mask", "mean_iou_matched")),
    ("false alarms per good image", ("good_images", "false_alarms_per_image")),
    ("image accuracy", ("image_decision", "detector", "accuracy")),
    ("balanced image accuracy", ("image_decision", "detector", "balanced_accuracy")),
)


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class KeyFigure:
    name: str
    value: str
    interval: str  # empty where there is none


def key_figures(metrics: Metrics) -> list[KeyFigure]:
    """The figures to show first, of those that there are."""
    figures = []
    for name, keys in KEY_FIGURES:
        value: Any = metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            interval = _interval(metrics, ".".join(keys))
            figures.append(KeyFigure(name, f"{value:.2f}", interval))
    if isinstance(metrics.get("missed"), list):
        text = f"{len(metrics['missed'])} of {metrics['instances']}"
        figures.append(KeyFigure("missed defects", text, ""))
    return figures


def tables(metrics: Metrics) -> list[Table]:
    found = [_headline(metrics), _per_class(metrics), _errors(metrics)]
    found += [_decisions(metrics), _recalls(metrics)]
    if metrics.get("unknown") is not None:  # which older evaluations do not have
        found.append(_unknown(metrics))
    if metrics["review"] is not None:
        found.insert(1, _review(metrics))
    if metrics["folds"] is not None:
        found.append(_folds(metrics["folds"]))
    if metrics["published"] is not None:
        found.append(_published(metrics["published"]))
    return found


def run_name(folder: Path, fold: int | str | None) -> str:
    """What to call a run by the folder of its results, which may be that of one fold."""
    if folder.name == f"fold{fold}":
        return f"{folder.parent.name}, fold {fold}"
    return folder.name


def markdown(metrics: Metrics) -> str:
    """The whole report: tables, plots, and what went wrong, image by image in short."""
    what = f"the {metrics['split']} split" if metrics["folds"] is None else "all folds"
    parts = [f"# Evaluation of {what}", *notes(metrics)]
    for table in tables(metrics):
        parts += [f"## {table.title}", markdown_table(table)]
    parts += ["## Plots", "![Precision and recall](pr_curves.png)", "![Confusion](confusion.png)"]
    if metrics["review"] is not None:
        parts.append("![Predicted quality and true IoU](quality.png)")
    parts.append("Each error as a picture: [errors/index.html](errors/index.html)")
    if metrics["missed"]:
        parts.append("## Missed defects")
        parts.append(
            "\n".join(
                f"- `{m['image']}`: {m['class']} at x, y, width, height = "
                + ", ".join(f"{v:g}" for v in m["bbox"])
                for m in metrics["missed"]
            )
        )
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """Its lines, without the title; numbers to the right."""
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.rows]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def show(metrics: Metrics) -> None:
    """Print the tables to the terminal."""
    console = Console(highlight=False)
    show_tables(console, tables(metrics))
    for note in notes(metrics):
        console.print(note, markup=False)


def show_tables(console: Console, shown: Sequence[Table]) -> None:
    """Print tables to the terminal."""
    for table in shown:
        drawn = rich.table.Table(
            title=table.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            show_edge=False,
        )
        for i, name in enumerate(table.header):
            drawn.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        console.print()


def notes(metrics: Metrics) -> list[str]:
    """What a reader must know to read the tables: one sentence or two each."""
    good, verdicts = metrics["good_images"], metrics["verdicts"]
    counts = ", ".join(f"{name} {count}" for name, count in verdicts.items())
    lines = [
        f"{metrics['images']} images, {good['count']} of them good, with {metrics['instances']} "
        f"defects. Images by verdict: {counts} (false alarm: a box too many, on any image).",
        f"A box counts from {_line('score', metrics['threshold']['value'])}: "
        f"{metrics['threshold']['reason']}.",
    ]
    if unseen := metrics.get("unseen_classes"):
        lines.append(
            f"No training image shows {', '.join(unseen)}: a detector that was trained on them "
            "does not know such defects, and they count as missed."
        )
    if (unknown := metrics.get("unknown")) is not None:
        lines.append(
            "An image is unknown, that is anomalous and of no known class, if no box counts and it "
            f"has {_line('anomaly score', unknown['threshold']['value'])} or more: "
            f"{unknown['threshold']['reason']}. {unknown['images']} images are. 'Boxes, lowered' "
            "count above another score, at which they call as many good images defective as both "
            "do; the gain is that of both over these."
        )
    if WITH_ANOMALY in metrics["image_decision"]:
        lines.append(
            f"'{WITH_ANOMALY}' calls an image defective by the score of its best box and its "
            "anomaly score together, weighed as the val split teaches; its class is the box's."
        )
    if (cost := metrics.get("cost")) is not None:  # which older evaluations do not have
        lines.append(
            f"Wrong decisions cost {cost['total']:g}, {cost['per_image']:.3g} an image: "
            f"{cost['misses']} defective images without a box at {cost['miss']:g} each, and "
            f"{cost['false_alarms']} good ones with a box at {cost['false_alarm']:g} each."
        )
    if metrics["folds"] is not None:
        lines.append(
            "Every image is measured with the models of the one fold that did not train on it. "
            "Average precision and its like compare scores of different models."
        )
    if metrics["review"] is not None:
        lines.append(
            f"A mask is listed for review under {_line('quality', metrics['review']['below'])}: "
            f"{metrics['review']['reason']}. A bad mask has an IoU under 0.5 with the truth."
        )
    if metrics["intervals"]:
        lines.append(
            f"In brackets: 95 % percentile bootstrap intervals, {metrics['resamples']} resamples "
            "of the images."
        )
    return lines


def _headline(metrics: Metrics) -> Table:
    box, mask, oracle, good = (metrics[k] for k in ("box", "mask", "truth_boxes", "good_images"))
    rows = [
        ("Box mAP50", box["map50"], "box.map50"),
        ("Box mAP50-95", box["map50_95"], "box.map50_95"),
    ]
    if mask is not None:
        rows += [
            ("Mask mAP50", mask["map50"], "mask.map50"),
            ("Mask mAP50-95", mask["map50_95"], "mask.map50_95"),
            ("Mean mask IoU, found defects", mask["mean_iou_matched"], "mask.mean_iou_matched"),
            ("Mean mask IoU, all defects", mask["mean_iou_all"], "mask.mean_iou_all"),
            ("Mean Dice, found defects", mask["dice_matched"], ""),
            ("Mean Dice, all defects", mask["dice_all"], ""),
        ]
    if oracle is not None:
        rows += [
            ("Mean mask IoU from true boxes", oracle["mean_iou"], "truth_boxes.mean_iou"),
            ("Mean Dice from true boxes", oracle["dice"], ""),
        ]
    per_image = "good_images.false_alarms_per_image"
    rows.append(("False alarms per good image", good["false_alarms_per_image"], per_image))
    if (at_rate := metrics["recall_at_false_alarms"]) is not None:
        name = "Recall at 1 false alarm per 100 good images"
        rows.append((name, at_rate["recall"], "recall_at_false_alarms.recall"))
    cells = [[name, _number(value), _interval(metrics, key)] for name, value, key in rows]
    cells.append(["Missed defects", f"{len(metrics['missed'])} of {metrics['instances']}", ""])
    return Table("Boxes and masks", ["measure", "value", "95 % interval"], cells)


def _review(metrics: Metrics) -> Table:
    """What the list catches; and how far a quality can be taken for the IoU."""
    titles = {"predictions": "found boxes", "truth_boxes": "true boxes"}
    known = [name for name in titles if metrics["review"][name] is not None]
    measures = (
        "Masks listed",
        "Bad masks listed",
        "Masks on no defect listed",
        "Mean error of quality",
        "Rank correlation of quality and IoU",
    )
    rows = zip(measures, *(_review_cells(metrics, name) for name in known), strict=True)
    return Table("Mask quality", ["measure", *(titles[name] for name in known)], list(rows))


def _review_cells(metrics: Metrics, name: str) -> list[str]:
    part, key = metrics["review"][name], f"review.{name}"
    cells = [
        f"{part['listed']} of {part['masks']} {_interval(metrics, f'{key}.share_listed')}",
        f"{part['caught']} of {part['bad']} {_interval(metrics, f'{key}.share_caught')}",
        f"{part['on_nothing_caught']} of {part['on_nothing']}",
        f"{_number(part['mean_absolute_error'])} "
        f"{_interval(metrics, f'{key}.mean_absolute_error')}",
        _number(part["spearman"]),
    ]
    return [cell.strip() for cell in cells]


def _per_class(metrics: Metrics) -> Table:
    measures = [("box AP50", "box", "ap50_per_class"), ("box AP50-95", "box", "ap_per_class")]
    if metrics["mask"] is not None:
        measures += [
            ("mask AP50", "mask", "ap50_per_class"),
            ("mask AP50-95", "mask", "ap_per_class"),
            ("mask IoU", "mask", "iou_per_class"),
            ("pixel IoU", "mask", "pixel_iou_per_class"),
        ]
    if metrics["truth_boxes"] is not None:
        measures.append(("mask IoU from true boxes", "truth_boxes", "iou_per_class"))
    counts = metrics["instances_per_class"]
    missed = [m["class"] for m in metrics["missed"]]
    rows = [
        ["true defects", *(str(count) for count in counts.values())],
        ["missed defects", *(str(missed.count(name)) for name in counts)],
    ]
    for measure, group, key in measures:
        rows.append([measure, *(_number(metrics[group][key][name]) for name in counts)])
        ranges = [_interval(metrics, f"{group}.{key}.{name}") for name in counts]
        if any(ranges):
            rows.append(["95 % interval", *ranges])
    return Table("By class", ["measure", *counts], rows)


def _errors(metrics: Metrics) -> Table:
    """Wrong boxes and missed defects at the threshold, by their kind."""
    meanings = {
        "wrong_class": "boxes around a defect of another class",
        "bad_box": "boxes of the right class, IoU 0.1 to 0.5",
        "both": "bad boxes of the wrong class",
        "duplicate": "boxes around a defect that is found already",
        "background": "boxes on no defect",
        "missed": "defects without any such box",
    }
    rows = [[text, str(metrics["errors"][kind])] for kind, text in meanings.items()]
    return Table("Errors at the score threshold", ["error", "count"], rows)


def _folds(folds: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            str(fold["fold"]),
            str(fold["images"]),
            str(fold["instances"]),
            f"{fold['threshold']['value']:.3f}",
            _number(fold["box"]["map50"]),
            _number(fold["box"]["map50_95"]),
        ]
        for fold in folds
    ]
    header = ["fold", "images", "defects", "score threshold", "box mAP50", "box mAP50-95"]
    return Table("Fold by fold", header, rows)


def _decisions(metrics: Metrics) -> Table:
    rows = []
    for name, scores in metrics["image_decision"].items():
        row = [_label(name, scores)]
        for key in ("accuracy", "balanced_accuracy", "macro_f1"):
            interval = _interval(metrics, f"image_decision.{name}.{key}")
            row.append(f"{_number(scores[key])} {interval}".strip())
        rows.append(row)
    return Table("Image decision", ["model", "accuracy", "balanced accuracy", "macro-F1"], rows)


def _recalls(metrics: Metrics) -> Table:
    names = [GOOD, *metrics["classes"]]
    rows = [
        [_label(name, scores), *(_number(scores["recall_per_class"][n]) for n in names)]
        for name, scores in metrics["image_decision"].items()
    ]
    return Table("Image decision: recall per class", ["model", *names], rows)


def _unknown(metrics: Metrics) -> Table:
    """Who calls which images defective: boxes, anomaly scores, or either of them."""
    unknown, unseen = metrics["unknown"], metrics["unseen_classes"]
    titles = {
        "detector": "boxes",
        "detector_lowered": "boxes, lowered",
        "anomaly": "anomaly score",
        "both": "both",
        "gain": "gain",
    }
    counts = unknown["images_per_class"]
    counts = {**counts, "all defective": unknown["images"] - counts[GOOD]}
    images: dict[str, tuple[str, ...]] = {
        GOOD: ("false_alarm_rate",),
        "all defective": ("recall",),
    }
    images |= {name: ("recall_per_class", name) for name in metrics["classes"]}
    rows = []
    for name, (group, *cls) in images.items():
        values = [unknown[part].get(group) for part in titles]
        if cls:
            values = [value[name] for value in values]
        label = f"{name} (unseen)" if name in unseen else name
        rows.append([label, *map(_number, values), str(counts[name])])
        keys = [".".join(("unknown", part, group, *cls)) for part in titles]
        ranges = [_interval(metrics, key) for key in keys]
        if any(ranges) and (not cls or name in unseen):  # those of all would make a long table
            rows.append(["95 % interval", *ranges, ""])
    return Table("Images called defective", ["images", *titles.values(), "unknown"], rows)


def _published(published: Mapping[str, Any]) -> Table:
    rows = [
        [row["name"], *(f"{row[part]:.3f}" for part in ("train", "val", "test"))]
        for row in published["rows"]
    ]
    title = f"Accuracy in {published['source']} ({published['note']})"
    return Table(title, ["model", "train", "val", "test"], rows)


def _label(name: str, scores: Mapping[str, Any]) -> str:
    return f"always {scores['class']}" if name == "majority" else name


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _line(what: str, value: float | None) -> str:
    article = "an" if what.startswith("a") else "a"
    return f"the {what} of its fold" if value is None else f"{article} {what} of {value:.3f}"


def _interval(metrics: Metrics, key: str) -> str:
    interval = metrics.get("intervals", {}).get(key)
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|")
