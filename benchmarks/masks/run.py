"""How good are the masks? Every method, view and kind of boxes on the same folds, side by side.

    python benchmarks/masks/run.py --mvtec-root datasets/mvtec_ad --category transistor

What the rows and the figures mean is in benchmarks/masks/README.md. The result goes to results.json
and results.png beside this file; that of a part (--folds, --methods) goes to the work folder, where
everything finished is kept: a benchmark that is called again goes on where it was. With --add, the
rows of a part join those that results.json has.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import figures
import methods
import numpy as np
import supervision as sv
from rich.console import Console
from rich.table import Table

from benchmarks import common
from pipeline import __version__, config, record
from pipeline.data import masks, predictions
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json, write_json
from pipeline.data.matching import MATCH_IOU
from pipeline.errors import UserError
from pipeline.models import sam as sams
from pipeline.models import weights
from pipeline.models.device import torch_device

HERE = Path(__file__).parent
FOLDS = 5
SEED = 0
VIEWS = {"whole": 0.0, "zoom": 1.3}  # side of the window around a box, in box sizes
JITTER = 0.1  # largest shift of a box's side, part of the box's width or height
DRAWS = 3  # jittered boxes of an instance
ZERO_SHOT = {
    "mobile_sam": "mobile-sam",
    "sam_vit_b": "sam-vit-b",
    "sam_vit_l": "sam-vit-l",
    "sam_vit_h": "sam-vit-h",
    "sam_lite_shipped": "sam-lite",
}
FINETUNED: dict[str, dict[str, Any]] = {  # options of `pipeline finetune-sam`
    "sam_lite_finetuned": {
        "model": "sam-lite",
        "train": "all",
        "epochs": 15,
        "offline": True,
    },
}
FINETUNE = common.pipeline("finetune-sam")
METHODS = ("box_filled", "grabcut", *ZERO_SHOT, *FINETUNED)

BoxesOf = Callable[[Sample, int], np.ndarray]  # (boxes, 4) for one true instance of an image


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    method: str
    view: str  # of VIEWS, or `any` where it makes no difference
    boxes: str  # truth_boxes, jittered_boxes or detector_boxes

    @property
    def key(self) -> str:
        return f"{self.method}/{self.view}/{self.boxes}"


@dataclass(frozen=True)
class Bench:
    """Where everything is."""

    dataset: Dataset
    work: Path
    detections: Path | None

    def folder(self, fold: int) -> Path:
        return self.work / f"fold{fold}"

    def detections_of(self, fold: int) -> Path:
        assert self.detections is not None
        return self.detections / f"fold{fold}"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        run(arguments)


def parser() -> argparse.ArgumentParser:
    parser = common.parser("masks", __doc__)
    parser.add_argument("--category", default="transistor")
    parser.add_argument(
        "--detections", type=Path, help="folder with the output of `pipeline segment` in fold0, ..."
    )
    parser.add_argument("--folds", type=int, nargs="+", choices=range(FOLDS), help="default: all")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all whose weights are here"
    )
    parser.add_argument(
        "--views", nargs="+", choices=VIEWS, default=[*VIEWS], help="what methods see (both)"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, found {arguments.jobs}")
    if arguments.add and arguments.folds is not None:
        raise UserError("--add: expected all folds, found --folds")
    folds = sorted(set(arguments.folds or range(FOLDS)))
    about = {
        "seed": SEED,
        "category": arguments.category,
        "folds": {"count": FOLDS, "measured": folds},
        "finetuned": FINETUNED,
    }
    if arguments.add:
        common.check_joins(HERE / "results.json", about)
    chosen = [name for name in METHODS if name in (arguments.methods or available())]
    dataset = converted(arguments.mvtec_root / arguments.category, arguments.work / "dataset")
    bench = Bench(dataset, arguments.work, arguments.detections)
    rows = planned(chosen, arguments.views, with_detections=arguments.detections is not None)
    train(bench, rows, folds, arguments.jobs)
    if not any(sample.annotations for fold in folds for sample in dataset.split("test", fold)):
        raise UserError("--folds: expected defects among the test images, found none")
    measured = {row: [measure(bench, row, fold) for fold in folds] for row in rows}
    summary = {
        row.key: figures.summarise(
            [instance for fold in parts for instance in fold],
            dataset.classes,
            [training_seconds(bench, row, fold) for fold in folds]
            if row.method in FINETUNED
            else [],
            SEED,
        )
        for row, parts in measured.items()
    }
    part = (
        arguments.folds is not None or arguments.methods is not None or arguments.views != [*VIEWS]
    )
    place = arguments.work if part and not arguments.add else HERE
    result = {
        **common.made_by(command(arguments)),
        "earlier": [],
        **about,
        "summary": summary,
        "instances": paired(measured),
    }
    if arguments.add:
        path = place / "results.json"
        before = read_json(path)["instances"] if path.is_file() else []
        result = common.joined(path, result)
        order = [row.key for row in planned(METHODS, [*VIEWS], with_detections=True)]
        result["summary"] = dict(sorted(result["summary"].items(), key=lambda r: order.index(r[0])))
        for old, new in zip(before, result["instances"], strict=bool(before)):
            new["iou"] = {key: {**old["iou"], **new["iou"]}[key] for key in result["summary"]}
    write_json(place / "results.json", result)
    figures.plot(place / "results.png", result["summary"])
    show(result["summary"])
    print(f"result: {place / 'results.json'}")


def available() -> list[str]:
    """The methods that need no download."""
    registry = weights.load_registry()
    here = {name for name, model in ZERO_SHOT.items() if weights.locate(registry[model])}
    return [name for name in METHODS if name not in ZERO_SHOT or name in here]


def planned(chosen: Sequence[str], views: Sequence[str], with_detections: bool) -> list[Row]:
    kinds = ["truth_boxes", "jittered_boxes"] + ["detector_boxes"] * with_detections
    return [
        Row(method, view, boxes)
        for method in chosen
        for view in (["any"] if method == "box_filled" else views)
        for boxes in kinds
    ]


def converted(source: Path, out: Path) -> Dataset:
    """The dataset with its folds, converted anew only if it is not there."""
    options = config.build(
        config.ConvertConfig, {"source": source, "out": out, "folds": FOLDS, "seed": SEED}
    )
    return common.converted(options)


# ---- Training --------------------------------------------------------------------------------


def train(bench: Bench, rows: Sequence[Row], folds: Sequence[int], jobs: int) -> None:
    """Fine-tune what the rows need, `jobs` at a time, each in a process of its own."""
    models = dict.fromkeys((row.method, row.view) for row in rows if row.method in FINETUNED)
    trainings = [training(bench, *model, fold) for fold in folds for model in models]
    common.run_stages([(FINETUNE, options) for options in trainings], jobs)


def training(bench: Bench, method: str, view: str, fold: int) -> config.FinetuneSamConfig:
    return config.build(
        config.FinetuneSamConfig,
        {
            **FINETUNED[method],
            "data": bench.dataset.root,
            "fold": fold,
            "zoom": VIEWS[view],
            "seed": SEED,
            "out": bench.folder(fold) / f"{method}-{view}",
        },
    )


def training_seconds(bench: Bench, row: Row, fold: int) -> float | None:
    """How long a training took, its start included; unknown if it was interrupted."""
    return common.timing_of(training(bench, row.method, row.view, fold).out)["seconds"]


# ---- Measuring -------------------------------------------------------------------------------


def measure(bench: Bench, row: Row, fold: int) -> list[dict[str, Any]]:
    """The instances of one fold's test images, measured; kept in a file, and read from there."""
    path = bench.folder(fold) / f"{row.key.replace('/', '-')}.json"
    made_from = made_of(bench, row, fold)
    if path.is_file() and (kept := read_json(path))["made_from"] == made_from:
        return kept["instances"]
    boxes_of, method = box_source(bench, row, fold), load(bench, row, fold)
    samples = [sample for sample in bench.dataset.split("test", fold) if sample.annotations]
    instances = measure_samples(method, boxes_of, samples, bench.dataset.classes, fold)
    write_json(path, {"made_from": made_from, "instances": instances})
    reached = np.mean([figures.mean(instance["iou"]) for instance in instances] or [0])
    print(f"{row.key}, fold {fold}: mean IoU {reached:.3f}", flush=True)
    return instances


def made_of(bench: Bench, row: Row, fold: int) -> dict[str, Any]:
    """All that a measurement depends on."""
    model = None
    if row.method in ZERO_SHOT:
        model = weights.load_registry()[ZERO_SHOT[row.method]].sha256
    elif row.method in FINETUNED:
        model = record.fingerprint(training(bench, row.method, row.view, fold).out)
    given = row.boxes == "detector_boxes"
    return {
        "row": row.key,
        "fold": fold,
        "dataset": record.fingerprint(bench.dataset.root),
        "weights": model,
        "detections": record.fingerprint(bench.detections_of(fold)) if given else None,
        "options": [SEED, JITTER, DRAWS, VIEWS.get(row.view)],
        "pipeline": __version__,
    }


def measure_samples(
    method: methods.Method,
    boxes_of: BoxesOf,
    samples: Sequence[Sample],
    classes: Sequence[str],
    fold: int,
) -> list[dict[str, Any]]:
    """Every true instance of the images, as figures.py reads it."""
    if samples:  # the first mask takes longer
        method(samples[0].image(), samples[0].truth.xyxy[0])
    instances = []
    for sample in samples:
        image, true_masks = sample.image(), np.asarray(sample.truth.mask)
        for index, annotation in enumerate(sample.annotations):
            instance: dict[str, Any] = {
                "image": sample.path.name,
                "index": index,
                "class": classes[annotation["category_id"] - 1],
                "fold": fold,
                **{name: [] for name in ("iou", "dice", "boundary_f1", "quality", "ms")},
            }
            for box in boxes_of(sample, index):
                started = time.perf_counter()
                mask, quality = method(image, box)
                instance["ms"].append(1000 * (time.perf_counter() - started))
                instance["iou"].append(masks.iou(mask, true_masks[index]))
                instance["dice"].append(masks.dice(mask, true_masks[index]))
                instance["boundary_f1"].append(masks.boundary_f1(mask, true_masks[index]))
                if quality is not None:
                    instance["quality"].append(quality)
            instances.append(instance)
    return instances


def load(bench: Bench, row: Row, fold: int) -> methods.Method:
    if row.method == "box_filled":
        return methods.box_filled
    zoom = VIEWS[row.view]
    if row.method == "grabcut":
        return methods.grabcut(zoom)
    if row.method in ZERO_SHOT:
        source = ZERO_SHOT[row.method]
    else:
        source = str(training(bench, row.method, row.view, fold).out / "sam.safetensors")
    loaded = _load_sam(source)
    return methods.sam(loaded, zoom and (loaded.zoom or zoom), torch_device("auto"))


@lru_cache(maxsize=1)  # one model serves several rows and folds
def _load_sam(source: str) -> sams.LoadedSam:
    return sams.load_sam(source, offline=True)


# ---- Boxes -----------------------------------------------------------------------------------


def box_source(bench: Bench, row: Row, fold: int) -> BoxesOf:
    if row.boxes == "truth_boxes":
        return lambda sample, index: sample.truth.xyxy[index : index + 1]
    if row.boxes == "jittered_boxes":
        return jittered_boxes
    return detector_boxes(bench.detections_of(fold), bench.dataset.classes)


def jittered_boxes(sample: Sample, index: int) -> np.ndarray:
    """The true box DRAWS times, each side moved at random; the same for every method."""
    box = sample.truth.xyxy[index]
    rng = np.random.default_rng([SEED, sample.image_id, index])
    shift = rng.uniform(-JITTER, JITTER, (DRAWS, 4)) * np.tile(box[2:] - box[:2], 2)
    limits = [sample.width, sample.height] * 2
    return np.clip(box + shift, 0, limits)


def detector_boxes(folder: Path, classes: tuple[str, ...]) -> BoxesOf:
    """The best box of the instance's class, or none if its IoU with the true box is under 0.5.

    Raises `UserError` when `folder` does not hold what `pipeline segment` found in these images.
    """
    names, images = predictions.read_images(folder)
    if names != classes:
        raise UserError(
            f"{folder / predictions.IMAGES}: expected the classes {', '.join(classes)}, "
            f"found {', '.join(names)}"
        )
    ids = {image["file_name"]: image["id"] for image in images}
    results = predictions.read_results(folder / predictions.PREDICTIONS)

    def boxes_of(sample: Sample, index: int) -> np.ndarray:
        if sample.path.name not in ids:
            raise UserError(
                f"{folder / predictions.IMAGES}: expected the fold's test images, "
                f"found no {sample.path.name}"
            )
        entries = results.get(ids[sample.path.name], ())
        category = sample.annotations[index]["category_id"]
        xywh = np.array([e["bbox"] for e in entries if e["category_id"] == category]).reshape(-1, 4)
        boxes = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
        if not len(boxes):
            return boxes
        overlap = sv.box_iou_batch(sample.truth.xyxy[index : index + 1], boxes)[0]
        best = int(np.argmax(overlap))
        return boxes[best : best + 1] if overlap[best] >= MATCH_IOU else boxes[:0]

    return boxes_of


# ---- Results ---------------------------------------------------------------------------------


def paired(measured: dict[Row, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Every instance once, with its IoU in each row."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row, folds in measured.items():
        for instance in (instance for fold in folds for instance in fold):
            identity = {key: instance[key] for key in ("image", "index", "class", "fold")}
            entry = found.setdefault(
                (instance["image"], instance["index"]), {**identity, "iou": {}}
            )
            entry["iou"][row.key] = round(figures.mean(instance["iou"]), 4)
    return [found[key] for key in sorted(found)]


def command(arguments: argparse.Namespace) -> str:
    """What was asked for, as anyone would type it."""
    words = ["python", "benchmarks/masks/run.py", "--mvtec-root", "datasets/mvtec_ad"]
    words += ["--category", arguments.category]
    if arguments.detections is not None:
        words += ["--detections", str(arguments.detections)]
    if arguments.folds is not None:
        words += ["--folds", *map(str, arguments.folds)]
    if arguments.methods is not None:
        words += ["--methods", *arguments.methods]
    if arguments.views != [*VIEWS]:
        words += ["--views", *arguments.views]
    words += ["--add"] * arguments.add
    if arguments.jobs != 1:
        words += ["--jobs", str(arguments.jobs)]
    return shlex.join(words)


def show(summary: dict[str, Any]) -> None:
    table = Table()
    classes = next(iter(summary.values()))["iou_per_class"]
    for title in ("", "mean IoU", "95 %", *classes, "p10", "Dice", "boundary F1", "ms"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for key, row in summary.items():
        low, high = row["mean_iou_interval"]
        means = [row["mean_iou"], *row["iou_per_class"].values()]
        means += [row["p10_iou"], row["dice"], row["boundary_f1"]]
        shown = ["–" if value is None else f"{value:.2f}" for value in means]
        table.add_row(key, shown[0], f"{low:.2f}–{high:.2f}", *shown[1:], f"{row['ms_per_box']}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
