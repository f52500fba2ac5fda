"""Every approach of the study on the same images, one row each.

    python benchmarks/study/run.py --mvtec-root datasets/mvtec_ad --category transistor

What the rows and the figures mean is in benchmarks/study/README.md. The result goes to results.json
beside this file, and its tables into README.md; that of a part (--methods, --protocols) goes to the
work folder, where everything finished is kept: a benchmark that is called again goes on where it
was. With --add, the rows of a part join those that results.json has.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from benchmarks import common
from pipeline import config
from pipeline.cli import COMMANDS
from pipeline.config import FOLD, StageConfig, of_fold
from pipeline.data import comparison, report
from pipeline.data.files import read_json, write_json, write_text
from pipeline.data.predictions import read_images
from pipeline.errors import UserError
from pipeline.models import weights
from pipeline.plan import plan

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/study: tables -->", "<!-- benchmarks/study: end of tables -->"
CONFIGS = ROOT / "configs"
FOLDS = 5
SEED = 0
PROTOCOLS = {
    "folds": "Five folds: each of all images is tested once",
    "study": "The study's 250/63 split: 63 test images, 8 of them defective",
    "mvtec": "MVTec's own protocol: train/good is learned, test is measured",
}
OPTIONS: dict[str, dict[str, Any]] = {}  # by command, of all its rows: the defaults
DETECTOR = "yolo-world-sam"
DETECTOR_CONFIG = CONFIGS / "transistor-5fold.yaml"

# The configurations of the study, and what is changed in them, by the name of the row.
LITE0: dict[str, Any] = {"model": "efficientnet-lite0", "offline": True}
LITE0_LAST = ["blocks.5", "blocks.6", "conv_head", "bn2", "classifier"]  # stride 32, as layer4
STUDY = {
    "resnet18": LITE0,
    "resnet18-rotation": LITE0,
    "resnet34-layer4": LITE0 | {"unfreeze": LITE0_LAST},
    "resnet50-adamw": LITE0,
    "resnet50-rotation": LITE0,
}
HEADS = "head-"  # rows of finetune-head, on the same frozen features
PLAIN = f"{HEADS}plain"  # that the others gain over
OURS = "efficientnet-lite0"
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in STUDY},
    "resnet18-from-scratch": ("resnet18", {"pretrained": False}),
    **{f"efficientnet-lite0-as-{name}": (name, changes) for name, changes in STUDY.items()},
    OURS: ("offline", {}),
}


@dataclass(frozen=True)
class Place:
    """Where one run of a row belongs."""

    source: Path  # the category, or the dataset
    fold: int | None
    out: Path  # for its results


Stages = list[tuple[str, StageConfig]]


@dataclass(frozen=True)
class Row:
    """An approach: the protocols it is measured by, and the stages of one run, by its place."""

    method: str
    protocols: Sequence[str]
    stages: Callable[[Place], Stages]
    result: str = "."  # of the last stage, in the place's folder


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = common.parser("study", __doc__)
    parser.add_argument("--category", default="transistor")
    names = [row.method for row in rows()]
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=names,
        metavar="METHOD",
        help=f"of {', '.join(names)} (default: all whose weights are here)",
    )
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, help="default: all")
    parser.add_argument(
        "--predictions",
        type=Path,
        help=f"output folders of `pipeline segment` on the folds, with {FOLD} in the path, for "
        f"{DETECTOR} in place of a training",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, found {arguments.jobs}")
    if arguments.predictions is not None and FOLD not in str(arguments.predictions):
        raise UserError(
            f"--predictions: expected a path with {FOLD}, found {arguments.predictions}"
        )
    path = HERE / "results.json"
    about = {"category": arguments.category, "seed": SEED, "folds": FOLDS}
    if arguments.add:
        common.check_joins(path, about)
    chosen = [row for row in rows() if row.method in (arguments.methods or available())]
    measured = [
        row
        for protocol in PROTOCOLS
        if protocol in (arguments.protocols or PROTOCOLS)
        for row in measure(arguments, protocol, [r for r in chosen if protocol in r.protocols])
    ]
    if not measured:
        raise UserError("--protocols: expected one that --methods are measured by, found none")
    result = {**common.made_by(command(arguments)), "earlier": [], **about, "rows": measured}
    if arguments.add:
        result = beside(path, result)
    elif arguments.methods or arguments.protocols:
        path = arguments.work / "results.json"
    write_json(path, result)
    if path.parent == HERE:
        write_readme(result["rows"])
    report.show_tables(Console(highlight=False, width=160), tables(result["rows"]))
    print(f"results: {path}")


def beside(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The rows, beside the others of an earlier result, in the order of the tables."""
    if not path.is_file():
        return result
    before, after = (
        {**its, "summary": {f"{row['protocol']}/{row['method']}": row for row in its["rows"]}}
        for its in (read_json(path), result)
    )
    together = common.join(before, after)
    order = [f"{protocol}/{row.method}" for protocol in PROTOCOLS for row in rows()]
    summary = together.pop("summary")
    together["rows"] = [summary[key] for key in sorted(summary, key=order.index)]
    return together


# ---- Rows --------------------------------------------------------------------------------------


def rows() -> list[Row]:
    """All of them, in the order of the tables."""
    classes, both = ["study"], ["folds", "study"]
    found = [Row(name, classes, classifier(name)) for name in CLASSIFIERS if name != OURS]
    found.append(Row(OURS, both, classifier(OURS)))
    found += [Row(f"{HEADS}{name}", both, head(name)) for name in offered("finetune-head")]
    found += [Row(name, [*PROTOCOLS], anomaly(name)) for name in offered("detect-anomaly")]
    return [*found, Row(DETECTOR, both, detector, "predictions")]


def offered(name: str) -> tuple[str, ...]:
    """The methods of a command, if there is such a command."""
    return get_args(COMMANDS[name].model_fields["method"].annotation) if name in COMMANDS else ()


def available() -> list[str]:
    """The rows that need no download."""
    registry = weights.load_registry()
    resnets = {name: registry[name.split("-")[0]] for name in STUDY}
    missing = {name for name, entry in resnets.items() if not weights.locate(entry)}
    return [row.method for row in rows() if row.method not in missing]


def classifier(method: str) -> Callable[[Place], Stages]:
    name, changes = CLASSIFIERS[method]
    values = {**config.read_yaml(CONFIGS / f"classifier-{name}.yaml"), **changes, "seed": SEED}

    def stages(place: Place) -> Stages:
        where = {"data": place.source, "fold": place.fold, "out": place.out}
        return [stage("finetune-classifier", {**values, **where})]

    return stages


def head(name: str) -> Callable[[Place], Stages]:
    def stages(place: Place) -> Stages:
        where = {"data": place.source, "fold": place.fold, "out": place.out}
        return [stage("finetune-head", {"method": name, "seed": SEED, **where})]

    return stages


def anomaly(name: str) -> Callable[[Place], Stages]:
    def stages(place: Place) -> Stages:
        where = {"source": place.source, "fold": place.fold, "out": place.out}
        return [stage("detect-anomaly", {"method": name, "seed": SEED, **where})]

    return stages


def stage(name: str, values: Mapping[str, Any]) -> tuple[str, StageConfig]:
    options = config.build(COMMANDS[name], {**values, **OPTIONS.get(name, {})})
    assert isinstance(options, StageConfig)
    return name, options


def detector(place: Place) -> Stages:
    """What `pipeline run` does until there are predictions, which have the anomaly scores too."""
    values = config.read_yaml(DETECTOR_CONFIG)
    values |= {"out": place.out, "fold": place.fold, "finetune_classifier": {}}
    values["convert"] = {"source": "it is converted already", "out": place.source}
    for section, name in (
        ("finetune_yolo", "detector"),
        ("finetune_sam", "segmenter"),
        ("detect_anomaly", "anomaly"),
        ("segment", "predictions"),
    ):
        values[section]["out"] = place.out / name
    values["segment"]["anomaly"] = place.out / "anomaly"
    planned = plan(config.build(config.RunConfig, values, file=DETECTOR_CONFIG))
    wanted = ("finetune-yolo", "finetune-sam", "detect-anomaly", "segment")
    return [s for s in planned if s[0] in wanted and getattr(s[1], "boxes", None) != "truth"]


# ---- Measuring ---------------------------------------------------------------------------------


def measure(
    arguments: argparse.Namespace, protocol: str, chosen: Sequence[Row]
) -> list[dict[str, Any]]:
    """Run what is missing of the rows, and measure all of them on the protocol's images."""
    if not chosen:
        return []
    source, folds = images_of(arguments, protocol)
    out = arguments.work / (f"fold{FOLD}" if protocol == "folds" else protocol)
    runs = {row.method: out / row.method / row.result for row in chosen}
    if protocol == "folds" and arguments.predictions is not None and DETECTOR in runs:
        runs[DETECTOR] = arguments.predictions
        chosen = [row for row in chosen if row.method != DETECTOR]
    planned = [
        [(common.pipeline(name), options) for name, options in row.stages(place)]
        for row in chosen
        for k in folds
        for place in [Place(source, k, out_of(out / row.method, k))]
    ]
    common.run_stages([stage for stages in planned for stage in stages[:-1]], arguments.jobs)
    common.run_stages([stages[-1] for stages in planned], arguments.jobs)
    if protocol == "mvtec":
        return [mvtec_row(method, read_json(run / "metrics.json")) for method, run in runs.items()]
    measured = compared(arguments.work / f"comparison-{protocol}", protocol, source, runs)
    heads = {method: run for method, run in runs.items() if method.startswith(HEADS)}
    gains = {}
    if PLAIN in heads:
        out = arguments.work / f"comparison-{protocol}-heads"
        gains = {its["method"]: its["gain"] for its in compared(out, protocol, source, heads)}
    return [{**its, "gain": gains.get(its["method"], {})} for its in measured]


def images_of(arguments: argparse.Namespace, protocol: str) -> tuple[Path, Sequence[int | None]]:
    """What the rows of a protocol learn from, and its folds."""
    category, work = arguments.mvtec_root / arguments.category, arguments.work
    if protocol == "mvtec":
        return category, [None]
    options: dict[str, Any] = {"source": category, "seed": SEED}
    if protocol == "study":
        options |= {"split": "study", "out": work / "dataset-study"}
    else:
        options |= {"folds": FOLDS, "out": work / "dataset"}
    data = common.converted(config.build(config.ConvertConfig, options)).root
    return data, [None] if protocol == "study" else range(FOLDS)


def out_of(path: Path, fold: int | None) -> Path:
    return path if fold is None else of_fold(path, fold)


def compared(
    out: Path, protocol: str, data: Path, runs: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """The rows of runs on a dataset, by `pipeline evaluate`."""
    fold = "all" if protocol == "folds" else None
    options = {"data": data, "fold": fold, "out": out, "runs": list(runs.values())}
    name, evaluate = stage("evaluate", options)
    common.run_stage((common.pipeline(name), evaluate), os.cpu_count() or 1)
    found = read_json(out / "comparison.json")
    about = {"protocol": protocol, "images": found["images"], "defective": found["defective"]}
    measured = []
    for (method, run), row in zip(runs.items(), found["rows"], strict=True):
        figures = {k: v for k, v in row.items() if k not in ("run", "method", "label", "needs")}
        if method == DETECTOR and figures["training_seconds"] is None:
            figures |= seconds_beside(run, range(FOLDS) if fold else [None])
        measured.append({"method": method, "needs": row["needs"], **about, **figures})
    return measured


def seconds_beside(run: Path, folds: Sequence[int | None]) -> dict[str, float | None]:
    """The seconds of a detector that an older version has trained, from the benchmark's files."""
    training, inference = [], []
    for k in folds:
        folder = out_of(run, k)
        options = config.read_yaml(folder / "config.yaml")
        outs = [Path(options[name]).parent for name in ("boxes", "sam")]
        training.append(total([common.timing_of(out)["seconds"] for out in outs]))
        seconds = common.timing_of(folder)["seconds"]
        inference.append(None if seconds is None else seconds / len(read_images(folder)[1]))
    return {
        "training_seconds": mean(training),
        "inference_seconds_per_image": mean(inference),
    }


def total(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def mvtec_row(method: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row of MVTec's own protocol, which has no dataset: by the run's own figures."""
    image, pixel, seconds = (metrics[group] for group in ("image", "pixel", "seconds"))
    return {
        "method": method,
        "needs": "good images",
        "protocol": "mvtec",
        "images": metrics["images"],
        "defective": metrics["defective"],
        "image_auroc": image["auroc"],
        "average_precision": image["average_precision"],
        "recall": image["recall"],
        "false_alarm_rate": image["false_alarm_rate"],
        "pixel_auroc": pixel["auroc"],
        "pro": pixel["pro"],
        "pixel_iou": pixel["iou"],
        **dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "map50", "mask_iou")),
        "training_seconds": seconds["training"],
        "inference_seconds_per_image": seconds["inference_per_image"],
        "intervals": {},
        "gain": {},
        "per_fold": None,
    }


# ---- Results -----------------------------------------------------------------------------------


def tables(measured: Sequence[Mapping[str, Any]]) -> list[report.Table]:
    """One for each protocol, and one of what the ways to learn from few images gain there."""
    found = []
    for protocol, title in PROTOCOLS.items():
        its = [{**row, "label": row["method"]} for row in measured if row["protocol"] == protocol]
        if its:
            found.append(comparison.figures_table(title, its))
        if ahead := [row for row in its if row["gain"]]:
            table = comparison.gains_table(PLAIN, ahead)
            found.append(replace(table, title=f"{title}, gain over {PLAIN}"))
    return found


def markdown(measured: Sequence[Mapping[str, Any]]) -> str:
    """What README.md has between the marks."""
    parts = [f"{table.title}:\n\n{report.markdown_table(table)}" for table in tables(measured)]
    return "\n\n".join(parts)


def write_readme(measured: Sequence[Mapping[str, Any]]) -> None:
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    write_text(README, f"{before}{begin}\n\n{markdown(measured)}\n\n{end}{after}")


def command(arguments: argparse.Namespace) -> str:
    """What was asked for, as anyone would type it."""
    words = ["python", "benchmarks/study/run.py", "--mvtec-root", "datasets/mvtec_ad"]
    words += ["--category", arguments.category]
    for name in ("methods", "protocols"):
        if values := getattr(arguments, name):
            words += [f"--{name}", *values]
    if arguments.predictions is not None:
        words += ["--predictions", str(Path("runs", *arguments.predictions.parts[-3:]))]
    words += ["--add"] * arguments.add
    if arguments.jobs != 1:
        words += ["--jobs", str(arguments.jobs)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
