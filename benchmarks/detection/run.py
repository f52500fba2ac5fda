"""How well are defects found? Ours beside Ultralytics' defaults, on the same five folds.

    python benchmarks/detection/run.py --mvtec-root datasets/mvtec_ad --checkpoint yolov8n.pt

What the rows and the figures mean is in benchmarks/detection/README.md. The result goes to
results.json, results.png and, with --few-shot, few_shot.png beside this file; that of a part
(--folds, --methods) goes to the work folder, where everything finished is kept: a benchmark that is
called again goes on where it was. With --add, rows of --methods join those that results.json has.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import common
from benchmarks.detection import figures
from benchmarks.detection.baselines import BASELINES
from pipeline import config, record
from pipeline.config import FOLD, SegmentConfig, StageConfig
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, sha256, write_json
from pipeline.data.predictions import coco_results, write_predictions
from pipeline.errors import UserError
from pipeline.models import yolo_world
from pipeline.models.device import torch_device
from pipeline.stages import run as runs
from pipeline.stages.finetune_yolo import DETECTOR

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "transistor-5fold.yaml"
PRETRAIN = CONFIG.with_name("pretrain-transistor.yaml")
SHIPPED = "ours_from_shipped_weights"
NOT_PRETRAINED = "ablation/no_rendered_images"
METHODS = ("ours", SHIPPED, *BASELINES)
# Options that differ from those of `ours`, by the name of the row.
ABLATION: dict[str, dict[str, Any]] = {
    NOT_PRETRAINED: {},
    "ablation/no_pasting": {"finetune_yolo.paste": 0.0},
    "ablation/no_balancing": {"finetune_yolo.defective": 0.0},
    "ablation/no_augmentation": {"finetune_yolo.augment": False},
    "ablation/one_scale": {"segment.scales": (1.0,)},
    "ablation/boxes_not_fitted": {"segment.fit_boxes": False},
    "ablation/scores_of_the_detector": {"segment.rescore": False},
}
FEW_SHOT: dict[str, dict[str, Any]] = {
    f"{figures.FEW_SHOT}{shots}": {"finetune_yolo.shots": shots} for shots in (1, 2, 4, 8)
}
CHANGES: Mapping[str, dict[str, Any]] = {**ABLATION, **FEW_SHOT}

Fold = int | Literal["all"]


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a method on one fold or, pooled, on all of them."""

    method: str
    fold: Fold
    stages: Sequence[tuple[str, StageConfig]]  # what `pipeline run` would do

    @property
    def key(self) -> str:
        return self.method if self.fold == "all" else f"{self.method}/fold{self.fold}"

    def of(self, command: str) -> list[StageConfig]:
        return [stage for name, stage in self.stages if name == command]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = common.parser("detection", __doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help=f"plain YOLOv8n that all methods but {SHIPPED} start from"
    )
    parser.add_argument(
        "--folds", type=int, nargs="+", help="each by itself (default: all, pooled)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *CHANGES],
        metavar="METHOD",
        help=f"of {', '.join([*METHODS, *CHANGES])} (default: the first {len(METHODS)})",
    )
    parser.add_argument("--ablation", action="store_true", help="also all of ablation/")
    parser.add_argument("--few-shot", action="store_true", help="also all of few_shot/")
    parser.add_argument(
        "--no-classifiers",
        dest="classifiers",
        action="store_false",
        help="leave out the image classifiers, which take as long as the detectors",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    chosen = methods(arguments)
    check(arguments, chosen)
    given = arguments.checkpoint
    about = {
        "config": f"configs/{CONFIG.name}",
        "checkpoint": None if given is None else {"name": given.name, "sha256": sha256(given)},
        "folds": arguments.folds or "all",
    }
    if arguments.add:
        common.check_joins(HERE / "results.json", about)
    folds: Sequence[Fold] = sorted(set(arguments.folds or ())) or ["all"]
    rows = [planned(arguments, method, fold) for fold in folds for method in chosen]
    (convert,) = rows[0].of("convert")
    assert isinstance(convert, config.ConvertConfig)
    common.converted(convert)
    if any(is_pretrained(method) for method in chosen):
        for stage in pretraining(arguments):
            common.run_stage(stage, os.cpu_count() or 1)
    common.run_stages(trainings(rows), arguments.jobs)
    predict(rows, arguments.jobs)
    evaluations = [evaluation(row) for row in rows]
    common.run_stages([(common.pipeline("evaluate"), e) for e in evaluations], arguments.jobs)
    summary = {
        row.key: figures.summarise(
            read_json(evaluated.out / "metrics.json"),
            [
                [common.timing_of(stage.out) for stage in stages]
                for stages in zip(*(row.of(name) for name in trained(row)), strict=True)
            ],
        )
        for row, evaluated in zip(rows, evaluations, strict=True)
    }
    part = arguments.folds is not None or arguments.methods is not None
    place = arguments.work if part and not arguments.add else HERE
    result = {
        **common.made_by(command(arguments)),
        "earlier": [],
        **about,
        "pretraining_minutes": pretraining_minutes(arguments, chosen),
        "summary": summary,
    }
    if arguments.add:
        result = common.joined(place / "results.json", result)
        order = [*METHODS, *CHANGES]
        result["summary"] = dict(sorted(result["summary"].items(), key=lambda r: order.index(r[0])))
    result["changes"] = {row: CHANGES[row] for row in result["summary"] if row in CHANGES}
    write_json(place / "results.json", result)
    figures.plot(place / "results.png", result["summary"])
    figures.plot_few_shot(place / "few_shot.png", result["summary"])
    figures.show(result["summary"])
    print(f"result: {place / 'results.json'}")


def methods(arguments: argparse.Namespace) -> list[str]:
    """What was asked for, in the order of the table."""
    chosen = {*(arguments.methods or METHODS)}
    chosen |= {*ABLATION} if arguments.ablation else set()
    chosen |= {*FEW_SHOT} if arguments.few_shot else set()
    return [method for method in (*METHODS, *CHANGES) if method in chosen]


def check(arguments: argparse.Namespace, chosen: Sequence[str]) -> None:
    """Raises `UserError` for options that do not fit together."""
    problems = []
    if arguments.add and arguments.folds is not None:
        problems.append("--add: expected all folds, found --folds")
    if arguments.jobs < 1:
        problems.append(f"--jobs: expected at least 1, found {arguments.jobs}")
    count = config.read_yaml(CONFIG)["convert"]["folds"]
    for fold in arguments.folds or ():
        if fold not in range(count):
            problems.append(f"--folds: expected 0 to {count - 1}, found {fold}")
    starting = [method for method in chosen if method != SHIPPED]
    if starting and arguments.checkpoint is None:
        problems.append(f"--checkpoint: required for {', '.join(starting)}, not given")
    elif arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        problems.append(f"--checkpoint: expected a file, found none at {arguments.checkpoint}")
    if problems:
        raise UserError(*problems)


def planned(arguments: argparse.Namespace, method: str, fold: Fold) -> Row:
    """The stages of `pipeline run CONFIG`, with what the method changes.

    Dataset, segmenters, anomaly detectors and classifiers are the same for all methods, and the
    detectors for those that do not change them. A baseline has neither segmenter nor anomaly
    detector: its boxes stay as they are, and decide alone.
    """
    values = config.read_yaml(CONFIG)
    work, changes = arguments.work, CHANGES.get(method, {})
    values |= {"out": work / method, "mvtec_root": arguments.mvtec_root, "fold": fold}
    values["convert"]["out"] = work / "dataset"
    values["finetune_sam"]["out"] = work / "segmenters" / f"fold{FOLD}"
    values["detect_anomaly"]["out"] = work / "anomaly" / f"fold{FOLD}"
    if not arguments.classifiers:
        values["finetune_classifier"] = {}
    if method in BASELINES:
        values["finetune_sam"] = values["detect_anomaly"] = None
    for name, options in values.get("finetune_classifier", {}).items():
        options["out"] = work / "classifiers" / f"fold{FOLD}" / name
    if is_pretrained(method):
        values["init"] = str(pretraining(arguments)[-1][1].out / DETECTOR)
    elif method != SHIPPED:
        values["init"] = str(arguments.checkpoint)
    if changes and not any(key.startswith("finetune_yolo.") for key in changes):
        values["finetune_yolo"]["out"] = work / "ours" / f"fold{FOLD}" / "detector"
    for key, value in changes.items():
        section, option = key.split(".")
        values.setdefault(section, {})[option] = value
    settings = config.build(config.RunConfig, values, file=CONFIG)
    return Row(method, fold, runs.plan(settings))


def is_pretrained(method: str) -> bool:
    """Whether the checkpoint is shown rendered images before the row's own training."""
    return method not in (SHIPPED, NOT_PRETRAINED, *BASELINES)


def pretraining(arguments: argparse.Namespace) -> list[common.Stage]:
    """What `pipeline run PRETRAIN --init CHECKPOINT` does until the detector is trained."""
    values = config.read_yaml(PRETRAIN)
    values |= {"out": arguments.work / "pretrained", "init": str(arguments.checkpoint)}
    stages = runs.plan(config.build(config.RunConfig, values, file=PRETRAIN))
    last = [name for name, _ in stages].index("finetune-yolo")
    return [(common.pipeline(name), options) for name, options in stages[: last + 1]]


def pretraining_minutes(arguments: argparse.Namespace, chosen: Sequence[str]) -> float | None:
    """How long the detector was trained on rendered images, if that is known and was needed."""
    if not any(is_pretrained(method) for method in chosen):
        return None
    seconds = common.timing_of(pretraining(arguments)[-1][1].out)["seconds"]
    return None if seconds is None else round(seconds / 60, 1)


def trained(row: Row) -> list[str]:
    """The trainings that the boxes and the image decision of a row come from."""
    ours = ["finetune-yolo", "finetune-sam", "detect-anomaly"]
    return ours[:1] if row.method in BASELINES else ours


def trainings(rows: Sequence[Row]) -> list[common.Stage]:
    """Those of all rows, and the classifiers: what rows share comes once."""
    found: dict[Path, common.Stage] = {}
    for row in rows:
        for command in (*trained(row), "finetune-classifier"):
            words = common.pipeline(command)
            if command == "finetune-yolo" and row.method in BASELINES:
                words = (str(HERE / "baselines.py"), row.method)
            found |= {stage.out: (words, stage) for stage in row.of(command)}
    return list(found.values())


def predict(rows: Sequence[Row], jobs: int) -> None:
    """The boxes that each row is measured by: those of `pipeline segment`, or of the detector."""
    segmented: list[common.Stage] = []
    for row in rows:
        for options in row.of("segment"):
            assert isinstance(options, SegmentConfig)
            if options.boxes == "truth":
                continue
            if row.method in BASELINES:
                find_boxes(options)
            else:
                segmented.append((common.pipeline("segment"), options))
    common.run_stages(segmented, jobs)


def find_boxes(options: SegmentConfig) -> None:
    """The boxes that `pipeline segment` would show to SAM, where they are not there yet."""
    name = "boxes"
    if record.is_complete(options.out, record.signature(name, options)):
        return
    print(f"{name} {options.out}", flush=True)
    dataset, device = Dataset(options.source), torch_device(options.device)
    model, _ = yolo_world.load_checkpoint(options.boxes)
    detector = yolo_world.Detector(model, options.image_size, device)
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for sample in (s for part in options.splits for s in dataset.split(part, options.fold)):
        found = detector.detect(sample.image(), options.min_score, options.max_boxes)
        results += coco_results(sample.image_id, found)
        size = {"width": sample.width, "height": sample.height}
        images.append({"id": sample.image_id, "file_name": sample.path.name, **size})
    write_predictions(options.out, results, images, detector.classes)
    common.finish(options.out, name, options)


def evaluation(row: Row) -> StageConfig:
    """`pipeline evaluate` for a row, without masks from true boxes: benchmarks/masks has those."""
    return row.of("evaluate")[0].model_copy(update={"truth_boxes": None})


def command(arguments: argparse.Namespace) -> str:
    """What was asked for, as anyone would type it."""
    words = ["python", "benchmarks/detection/run.py", "--mvtec-root", "datasets/mvtec_ad"]
    if arguments.checkpoint is not None:
        words += ["--checkpoint", arguments.checkpoint.name]
    if arguments.folds is not None:
        words += ["--folds", *map(str, arguments.folds)]
    if arguments.methods is not None:
        words += ["--methods", *arguments.methods]
    words += ["--ablation"] * arguments.ablation + ["--few-shot"] * arguments.few_shot
    words += ["--no-classifiers"] * (not arguments.classifiers) + ["--add"] * arguments.add
    if arguments.jobs != 1:
        words += ["--jobs", str(arguments.jobs)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
