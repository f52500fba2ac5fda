"""Are defects found that no model has been shown? One class at a time is left out of the training.

    python benchmarks/unknown/run.py --mvtec-root datasets/mvtec_ad

What the rows and the figures mean is in benchmarks/unknown/README.md. The result goes to
results.json and results.png beside this file; that of a part (--classes) goes to the work folder,
where everything finished is kept: a benchmark that is called again goes on where it was. With
--add, the rows of a part join those that results.json has.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import common
from pipeline import config
from pipeline.config import ConvertConfig, EvaluateConfig, StageConfig
from pipeline.data import mvtec
from pipeline.data.dataset import GOOD
from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError
from pipeline.stages import run as runs

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "transistor-5fold.yaml"
COLOURS = {  # of the bars: Okabe and Ito's, which the colour-blind can tell apart
    "detector": "#999999",
    "detector_lowered": "#0072B2",
    "anomaly": "#E69F00",
    "both": "#009E73",
}


@dataclass(frozen=True)
class Row:
    """One line: the class that is left out, and the stages that measure what comes of it."""

    unseen: str
    convert: ConvertConfig
    trained: Sequence[common.Stage]
    segment: common.Stage
    evaluate: EvaluateConfig


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = common.parser("unknown", __doc__)
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="left out (default: each)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    chosen = classes(arguments)
    about = {"config": f"configs/{CONFIG.name}"}
    if arguments.add:
        common.check_joins(HERE / "results.json", about)
    rows = [planned(arguments, unseen) for unseen in chosen]
    for row in rows:
        common.converted(row.convert)
    common.run_stages([stage for row in rows for stage in row.trained], arguments.jobs)
    common.run_stages([row.segment for row in rows], arguments.jobs)
    evaluations = [(common.pipeline("evaluate"), row.evaluate) for row in rows]
    common.run_stages(evaluations, arguments.jobs)
    result = {
        **common.made_by(command(arguments)),
        "earlier": [],
        **about,
        "summary": {row.unseen: summarise(row) for row in rows},
    }
    place = arguments.work if arguments.classes and not arguments.add else HERE
    if arguments.add:
        result = common.joined(place / "results.json", result)
        result["summary"] = dict(sorted(result["summary"].items()))
    result["all"] = together(result["summary"])
    write_json(place / "results.json", result)
    lines = {**result["summary"], "all": result["all"]}
    plot(place / "results.png", lines)
    show(lines)
    print(f"result: {place / 'results.json'}")


def classes(arguments: argparse.Namespace) -> list[str]:
    """The classes to leave out, in the order of the table. Raises `UserError` for others."""
    source = arguments.mvtec_root / config.read_yaml(CONFIG)["convert"]["source"]
    known = sorted({entry.cls for entry in mvtec.scan(source).entries} - {GOOD})
    problems = [
        f"--classes: expected some of {', '.join(known)}, found '{name}'"
        for name in arguments.classes or ()
        if name not in known
    ]
    if arguments.jobs < 1:
        problems.append(f"--jobs: expected at least 1, found {arguments.jobs}")
    if problems:
        raise UserError(*problems)
    return [name for name in known if name in (arguments.classes or known)]


def planned(arguments: argparse.Namespace, unseen: str) -> Row:
    """The stages of `pipeline run CONFIG` on a single split."""
    values = config.read_yaml(CONFIG)
    out = arguments.work / unseen
    values |= {"out": out, "mvtec_root": arguments.mvtec_root, "fold": None}
    values |= {"finetune_sam": None, "finetune_classifier": {}}
    values["convert"] |= {"folds": 0, "unseen": [unseen]}
    planned: dict[str, StageConfig] = {}
    for name, stage in runs.plan(config.build(config.RunConfig, values, file=CONFIG)):
        planned.setdefault(name, stage)  # of two segments, the one with the detector's boxes
    convert, evaluate = planned["convert"], planned["evaluate"]
    assert isinstance(convert, ConvertConfig) and isinstance(evaluate, EvaluateConfig)
    return Row(
        unseen,
        convert,
        [(common.pipeline(name), planned[name]) for name in ("finetune-yolo", "detect-anomaly")],
        (common.pipeline("segment"), planned["segment"]),
        evaluate.model_copy(update={"truth_boxes": None}),
    )


def summarise(row: Row) -> dict[str, Any]:
    """One row: what was found of the class that was left out, by each of the systems."""
    metrics = read_json(row.evaluate.out / "metrics.json")
    assert metrics["unseen_classes"] == [row.unseen]
    names = (GOOD, *metrics["classes"])
    images = dict(
        zip(names, map(sum, metrics["image_decision"]["detector"]["confusion"]), strict=True)
    )
    unknown = metrics["unknown"]
    training = common.timing_of(row.trained[0][1].out)["seconds"]
    return {
        "good_images": images[GOOD],
        "systems": {
            name: {
                "false_alarm_rate": unknown[name]["false_alarm_rate"],
                **part(
                    round(unknown[name]["recall_per_class"][row.unseen] * images[row.unseen], 4),
                    images[row.unseen],
                ),
            }
            for name in COLOURS
        },
        "named_unknown": unknown["images_per_class"][row.unseen],
        "gain": unknown["gain"]["recall_per_class"][row.unseen],
        "gain_interval": metrics["intervals"].get(f"unknown.gain.recall_per_class.{row.unseen}"),
        "recall_per_class": {name: unknown[name]["recall_per_class"] for name in COLOURS},
        "score_threshold": metrics["threshold"]["value"],
        "lowered_above_score": unknown["detector_lowered"]["above_score"],
        "anomaly_threshold": unknown["threshold"]["value"],
        "training_minutes": None if training is None else round(training / 60, 1),
    }


def part(found: float, images: int) -> dict[str, Any]:
    """A recall of images and its 95 % interval, which is also one where none or all are found.

    It is Wilson's (Journal of the American Statistical Association 22, 1927).
    """
    z, recall = 1.959964, found / images
    middle = recall + z**2 / (2 * images)
    half = z * math.sqrt(recall * (1 - recall) / images + (z / (2 * images)) ** 2)
    bounds = [(middle + side * half) / (1 + z**2 / images) for side in (-1, 1)]
    return {
        "found": round(found, 4),
        "images": images,
        "recall": round(recall, 4),
        "interval": [round(min(max(bound, 0.0), 1.0), 4) for bound in bounds],
    }


def together(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All unseen images, each judged by the models that did not know its class."""
    systems = {}
    for name in COLOURS:
        each = [row["systems"][name] for row in summary.values()]
        found, images = (sum(its[key] for its in each) for key in ("found", "images"))
        rate = float(np.mean([its["false_alarm_rate"] for its in each]))
        systems[name] = {"false_alarm_rate": round(rate, 6), **part(found, images)}
    gain = systems["both"]["recall"] - systems["detector_lowered"]["recall"]
    return {
        "systems": systems,
        "named_unknown": sum(row["named_unknown"] for row in summary.values()),
        "gain": round(gain, 4),
    }


def plot(path: Path, lines: Mapping[str, Mapping[str, Any]]) -> None:
    bars = {
        unseen: {
            name: (row["systems"][name]["recall"], tuple(row["systems"][name]["interval"]))
            for name in COLOURS
        }
        for unseen, row in lines.items()
    }
    label = "part of the unseen class's images that are called defective, with 95 % interval"
    common.plot_bars(path, bars, COLOURS, label)


def show(lines: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="unseen images found (false alarms per good image)")
    for title in ("unseen class", *COLOURS, "named unknown"):
        table.add_column(title.replace("_", " "), justify="right")
    for unseen, row in lines.items():
        cells = [
            f"{its['found']:.3g} of {its['images']} ({its['false_alarm_rate']:.3f})"
            for its in row["systems"].values()
        ]
        table.add_row(unseen, *cells, str(row["named_unknown"]))
    Console(width=140).print(table)


def command(arguments: argparse.Namespace) -> str:
    """What was asked for, as anyone would type it."""
    words = ["python", "benchmarks/unknown/run.py", "--mvtec-root", "datasets/mvtec_ad"]
    if arguments.classes:
        words += ["--classes", *arguments.classes]
    words += ["--add"] * arguments.add
    if arguments.jobs != 1:
        words += ["--jobs", str(arguments.jobs)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
