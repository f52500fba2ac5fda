"""The figures of the detection benchmark, taken from evaluations: rows, table and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks import common
from pipeline.data.decision import WITH_ANOMALY

COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "mAP50": "#0072B2",
    "mAP50-95": "#E69F00",
    "recall at 1 false alarm per 100 good images": "#009E73",
}
FEW_SHOT = "few_shot/"  # the rows of the few-shot curve, ending in the images of each defect
OURS = {  # keys that metrics.json has elsewhere
    "box.": "",
    "good_images.false_alarms_per_image": "false_alarms_per_good_image",
}


def summarise(
    metrics: Mapping[str, Any], timings: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """One row: figures of an evaluation's metrics.json, and the times of each fold's trainings.

    What the figures mean is in docs/metrics.md. Null stands for what is unknown.
    """
    minutes = [_minutes([timing["seconds"] for timing in fold]) for fold in timings]
    known = [m for m in minutes if m is not None]
    decisions = metrics["image_decision"]
    decision = decisions[decider(decisions)]
    folds = metrics["folds"]
    row: dict[str, Any] = {
        "images": metrics["images"],
        "instances": metrics["instances"],
        **{key: metrics["box"][key] for key in ("map50", "map50_95", "ap50_per_class")},
        "recall_at_false_alarms": metrics["recall_at_false_alarms"],
        "false_alarms_per_good_image": metrics["good_images"]["false_alarms_per_image"],
        "errors": metrics["errors"],
        "image_accuracy": decision["accuracy"],
        "balanced_accuracy": decision["balanced_accuracy"],
        "image_decision": decisions,
        "map50_per_fold": None if folds is None else [fold["box"]["map50"] for fold in folds],
        "minutes_per_fold": round(sum(known) / len(known), 1) if known else None,
        "minutes": minutes,
        "threads": [fold[0]["threads"] for fold in timings],
    }
    intervals = {_renamed(key): bounds for key, bounds in metrics["intervals"].items()}
    row["intervals"] = {k: v for k, v in intervals.items() if k.split(".")[0] in row}
    return row


def decider(decisions: Mapping[str, Any]) -> str:
    """Which of an evaluation's models decides on the image: with anomaly scores, if there are."""
    return WITH_ANOMALY if WITH_ANOMALY in decisions else "detector"


def _minutes(seconds: Sequence[float | None]) -> float | None:
    """The sum, if all are known."""
    known = [s for s in seconds if s is not None]
    return round(sum(known) / 60, 1) if len(known) == len(seconds) else None


def _renamed(key: str) -> str:
    for theirs, ours in OURS.items():
        key = key.replace(theirs, ours) if key.startswith(theirs) else key
    return key


def plot(path: Path, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of three figures with their intervals: a group for each row."""
    bars: dict[str, dict[str, common.Bar]] = {}
    for name, row in summary.items():
        values = [
            row["map50"],
            row["map50_95"],
            (row["recall_at_false_alarms"] or {}).get("recall"),
        ]
        keys = ["map50", "map50_95", "recall_at_false_alarms.recall"]
        bars[name] = {
            kind: (value, row["intervals"].get(key, (value, value)))
            for kind, value, key in zip(COLOURS, values, keys, strict=True)
            if value is not None
        }
    common.plot_bars(
        path, bars, COLOURS, "average precision and recall of the boxes, with 95 % interval"
    )


def plot_few_shot(path: Path, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """mAP50 and mAP50-95 by the images of each defect, as lines with their 95 % intervals.

    Nothing is written where no such row was measured.
    """
    rows = {
        int(name.removeprefix(FEW_SHOT)): row
        for name, row in summary.items()
        if name.startswith(FEW_SHOT)
    }
    if not rows:
        return
    shots = sorted(rows)
    figure, axis = plt.subplots(figsize=(6, 4))
    for kind, key in (("mAP50", "map50"), ("mAP50-95", "map50_95")):
        values = [rows[n][key] for n in shots]
        bounds = [rows[n]["intervals"].get(key, (rows[n][key],) * 2) for n in shots]
        axis.plot(shots, values, "o-", color=COLOURS[kind], label=kind)
        axis.fill_between(
            shots, *zip(*bounds, strict=True), color=COLOURS[kind], alpha=0.15, linewidth=0
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(n) for n in shots])
    axis.set(xlabel="training images of each defect", ylabel="of the boxes, with 95 % interval")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    common.save_plot(figure, path)


def show(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """The rows as a table; below them what else decides on the images of each row."""
    first = next(iter(summary.values()))
    table = Table()
    classes = [f"AP50 {name}" for name in first["ap50_per_class"]]
    titles = ("mAP50", "95 %", "mAP50-95", *classes, "recall at 1:100")
    titles += ("false alarms", "accuracy", "balanced", "macro F1", "minutes")
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right")
    for name, row in summary.items():
        recall = row["recall_at_false_alarms"]
        figures = [row["map50"], "", row["map50_95"], *row["ap50_per_class"].values()]
        figures += [None if recall is None else recall["recall"]]
        figures += [
            row["false_alarms_per_good_image"],
            *_decision(row, decider(row["image_decision"])),
        ]
        shown = [_number(value) for value in figures]
        if "map50" in row["intervals"]:
            shown[1] = "–".join(map(_number, row["intervals"]["map50"]))
        minutes = row["minutes_per_fold"]
        shown.append("–" if minutes is None else f"{minutes:.1f}")
        table.add_row(name, *shown)
    table.add_section()
    others = {  # of equal images they are equal in each row
        (model, *_decision(row, model)): None
        for row in summary.values()
        for model in row["image_decision"]
        if model not in ("detector", decider(row["image_decision"]))
    }
    for model, *decision in others:
        blank = [""] * (len(titles) - len(decision) - 1)
        table.add_row(model, *blank, *map(_number, decision), "")
    Console(width=200).print(table)


def _decision(row: Mapping[str, Any], model: str) -> list[float | None]:
    scores = row["image_decision"][model]
    return [scores[key] for key in ("accuracy", "balanced_accuracy", "macro_f1")]


def _number(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:.2f}"
