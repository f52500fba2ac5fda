"""Every approach of the study on the same images, one row each.

    python benchmarks/study/run.py --mvtec-root datasets/mvtec_ad --category transistor

What the rows and the figures mean is in benchmarks/study/README.md. The result goes to results.json
beside this file; that of a part (--methods, --protocols, --folds) goes to the work folder, where
everything finished is kept: a benchmark that is called again goes on where it was.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import common
from pipeline import config
from pipeline.data.files import read_json, write_json

HERE = Path(__file__).parent
FOLDS = 5
SEED = 0
ANOMALY = ("cosine", "mahalanobis", "padim", "patchcore")  # of `pipeline detect-anomaly`
PROTOCOLS = ("mvtec", "folds")
DETECT_ANOMALY = common.pipeline("detect-anomaly")
OPTIONS: dict[str, Any] = {}  # of all methods: the defaults
FIGURES = {  # key of a row, and the keys of metrics.json
    "image_auroc": ("image", "auroc"),
    "average_precision": ("image", "average_precision"),
    "pixel_auroc": ("pixel", "auroc"),
    "pro": ("pixel", "pro"),
    "pixel_iou": ("pixel", "iou"),
    "recall": ("image", "recall"),
    "false_alarm_rate": ("image", "false_alarm_rate"),
    "training_seconds": ("seconds", "training"),
    "inference_seconds_per_image": ("seconds", "inference_per_image"),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--mvtec-root", type=Path, required=True, help="holds the category")
    parser.add_argument("--category", default="transistor")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-study"))
    parser.add_argument("--methods", nargs="+", choices=ANOMALY, help="default: all")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, help="default: all")
    parser.add_argument("--folds", type=int, nargs="+", choices=range(FOLDS), help="default: all")
    return parser


def run(arguments: argparse.Namespace) -> None:
    category, work = arguments.mvtec_root / arguments.category, arguments.work
    protocols = [p for p in PROTOCOLS if p in (arguments.protocols or PROTOCOLS)]
    methods = [m for m in ANOMALY if m in (arguments.methods or ANOMALY)]
    folds = sorted(set(arguments.folds or range(FOLDS)))
    rows = []
    for protocol in protocols:
        for method in methods:
            stages = planned(method, protocol, category, work, folds)
            common.run_stages([(DETECT_ANOMALY, stage) for stage in stages], jobs=1)
            measured = [read_json(stage.out / "metrics.json") for stage in stages]
            rows.append(summarise(method, protocol, measured))
    results = {
        **common.made_by(command(arguments)),
        "category": arguments.category,
        "seed": SEED,
        "folds": {"count": FOLDS, "measured": folds},
        "rows": rows,
    }
    partial = arguments.methods or arguments.protocols or arguments.folds
    path = (work if partial else HERE) / "results.json"
    write_json(path, results)
    show(rows)
    print(f"results: {path}")


def planned(
    method: str, protocol: str, category: Path, work: Path, folds: Sequence[int]
) -> list[config.DetectAnomalyConfig]:
    """The runs of one row: one of MVTec's own protocol, or one for each fold."""
    options: dict[str, Any] = {**OPTIONS, "method": method, "seed": SEED}
    if protocol == "mvtec":
        runs = [{"source": category, "out": work / "mvtec" / method}]
    else:
        convert = {"source": category, "out": work / "dataset", "folds": FOLDS, "seed": SEED}
        data = common.converted(config.build(config.ConvertConfig, convert)).root
        runs = [{"source": data, "fold": k, "out": work / f"fold{k}" / method} for k in folds]
    return [config.build(config.DetectAnomalyConfig, options | run) for run in runs]


def summarise(method: str, protocol: str, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: the mean of each figure over the runs that define it, and each run's figures."""
    runs = [
        {
            "fold": metrics["fold"],
            **{key: metrics[group][name] for key, (group, name) in FIGURES.items()},
        }
        for metrics in measured
    ]
    return {
        "method": method,
        "protocol": protocol,
        "needs": "good images",
        "images": sum(metrics["images"] for metrics in measured),
        "defective": sum(metrics["defective"] for metrics in measured),
        **{key: mean([run[key] for run in runs]) for key in FIGURES},
        "per_fold": runs if protocol == "folds" else None,
    }


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def command(arguments: argparse.Namespace) -> str:
    """What was asked for, as anyone would type it."""
    words = ["python", "benchmarks/study/run.py", "--mvtec-root", "datasets/mvtec_ad"]
    words += ["--category", arguments.category]
    for name in ("methods", "protocols", "folds"):
        if values := getattr(arguments, name):
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table()
    table.add_column("method", no_wrap=True)
    table.add_column("protocol", no_wrap=True)
    for title in (
        "image AUROC",
        "AP",
        "pixel AUROC",
        "PRO",
        "pixel IoU",
        "training, s",
        "image, s",
    ):
        table.add_column(title, justify="right")
    keys = ("image_auroc", "average_precision", "pixel_auroc", "pro", "pixel_iou")
    for row in rows:
        shown = ["–" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        seconds = (f"{row['training_seconds']:.0f}", f"{row['inference_seconds_per_image']:.2f}")
        table.add_row(row["method"], row["protocol"], *shown, *seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
