"""How fast is an annotated video made? `pipeline overlay` beside supervision's own annotators.

    python benchmarks/overlay/run.py --mvtec-root datasets/mvtec_ad --category transistor

What the rows mean is in benchmarks/overlay/README.md. The result goes to results.json beside this
file.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv
from rich.console import Console
from rich.table import Table

from benchmarks import common
from pipeline.config import ConvertConfig
from pipeline.data import writers
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.draw import ReviewDrawer
from pipeline.data.files import read_image, write_json
from pipeline.data.masks import decode_rle
from pipeline.data.paint import paint_labels, paint_shapes
from pipeline.data.palette import CLASS_COLOURS, ink
from pipeline.data.predictions import coco_results, from_coco_results
from pipeline.data.video import ahead

HERE = Path(__file__).parent
RATE = 10  # frames per second
SIZE = 16  # of our letters, in pixels: about those of supervision's default
LINE = 2  # thickness of lines in pixels, supervision's default
Entries = list[dict[str, Any]]
Item = tuple[Path, Entries]  # an image, and COCO results for it


def main() -> None:
    args = _arguments()
    with common.problems_as_lines("benchmarks/overlay/run.py"):
        source = args.mvtec_root / args.category
        dataset = common.converted(ConvertConfig(source=source, out=args.work / "dataset"))
    samples = sorted(_all(dataset), key=lambda sample: sample.path.name)
    rng = np.random.default_rng(0)
    defective = [sample for sample in samples if len(sample.annotations)]
    crowded = [(s.path, [e for _ in range(5) for e in _shifted(s, rng)]) for s in defective]
    real = [(s.path, _shifted(s, rng)) for s in samples if s in defective or rng.random() < 0.1]
    workloads: dict[str, tuple[list[Item], int]] = {
        "one frame per image": (real, 1),
        "one second per image": (real[:40], RATE),
        "crowded": (crowded, 1),
    }
    results = {
        name: measure(items, repeat, dataset.classes, args.rounds)
        for name, (items, repeat) in workloads.items()
    }
    _show(results)
    write_json(
        HERE / "results.json",
        {
            "made_by": common.made_by(args.command),
            "images": {name: len(items) for name, (items, _) in workloads.items()},
            "instances": {n: sum(len(e) for _, e in i) for n, (i, _) in workloads.items()},
            "results": results,
        },
    )


# ---- The two ways -------------------------------------------------------------------------------


def ours(items: Sequence[Item], classes: Sequence[str], repeat: int, out: Path) -> None:
    """The same drawing with the painters and the writer of `pipeline overlay`."""
    read = ((read_image(path), from_coco_results(entries)) for path, entries in items)
    with writers.create(out, Fraction(RATE)) as video:
        for image, found in ahead(read):
            paint_shapes(image, found, LINE)
            paint_labels(image, found, _labels(found, classes), SIZE)
            video.write(image, repeat)


def whole_frames(items: Sequence[Item], classes: Sequence[str], repeat: int, out: Path) -> None:
    """What `pipeline overlay` draws: also the title, verdict, legend and insets of its frames."""
    drawer = ReviewDrawer(classes, ("prediction",), (640, 640), "a note")
    read = ((path, read_image(path), from_coco_results(entries)) for path, entries in items)
    with writers.create(out, Fraction(RATE)) as video:
        for path, image, found in ahead(read):
            panel = found, _labels(found, classes)
            frame = drawer.draw(image, [panel], path.name, "hit", "1 / 1", found.xyxy)
            video.write(frame, repeat)


def theirs(items: Sequence[Item], classes: Sequence[str], repeat: int, out: Path) -> None:
    """Supervision's annotators in its `VideoSink`, as its documentation puts them together."""
    text = sv.ColorPalette([ink(colour) for colour in CLASS_COLOURS.colors])
    mask = sv.MaskAnnotator(CLASS_COLOURS, opacity=0.3)
    outline = sv.PolygonAnnotator(CLASS_COLOURS, thickness=LINE)
    box = sv.BoxAnnotator(CLASS_COLOURS, thickness=LINE)
    label = sv.LabelAnnotator(CLASS_COLOURS, text_color=text)
    height, width = cv2.imread(str(items[0][0])).shape[:2]
    info = sv.VideoInfo(width, height, RATE, len(items) * repeat)
    with sv.VideoSink(str(out), info) as sink:
        for path, entries in items:
            image, found = cv2.imread(str(path)), from_coco_results(entries)
            if len(found):
                image = mask.annotate(image, found)
                image = outline.annotate(image, found)
                image = box.annotate(image, found)
                image = label.annotate(image, found, _labels(found, classes))
            for _ in range(repeat):
                sink.write_frame(image)


def _labels(found: sv.Detections, classes: Sequence[str]) -> list[str]:
    if not len(found):
        return []
    assert found.class_id is not None and found.confidence is not None
    return [f"{classes[k]} {s:.2f}" for k, s in zip(found.class_id, found.confidence, strict=True)]


# ---- Measuring ----------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Sequence[Item], Sequence[str], int, Path], None]] = {
    "supervision": theirs,
    "pipeline, the same drawing": ours,
    "pipeline, whole frames": whole_frames,
}


def measure(
    items: Sequence[Item], repeat: int, classes: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Milliseconds per image of each way, in turn, and how much longer supervision takes.

    The ratio is that of one round, so that a machine that is busy for a while counts for both.
    """
    wall: dict[str, list[float]] = {name: [] for name in WAYS}
    work: dict[str, list[float]] = {name: [] for name in WAYS}
    kilobytes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):  # the first round is for warming up
            for name, way in WAYS.items():
                out = Path(folder) / "video.mp4"
                started, worked = time.perf_counter(), time.process_time()
                way(items, classes, repeat, out)
                if number >= 0:
                    wall[name].append((time.perf_counter() - started) / len(items) * 1000)
                    work[name].append((time.process_time() - worked) / len(items) * 1000)
                kilobytes[name] = round(out.stat().st_size / 1000)
    peer = "supervision"
    return {
        name: {
            "wall_ms_per_image": _spread(np.array(wall[name])),
            "cpu_ms_per_image": _spread(np.array(work[name])),
            "wall_speed_up": _spread(np.array(wall[peer]) / np.array(wall[name])),
            "cpu_speed_up": _spread(np.array(work[peer]) / np.array(work[name])),
            "kilobytes": kilobytes[name],
        }
        for name in WAYS
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _all(dataset: Dataset) -> list[Sample]:
    return [sample for name in ("train", "val", "test") for sample in dataset.split(name)]


def _shifted(sample: Sample, rng: np.random.Generator) -> Entries:
    """True instances as predictions that are a little off, with scores."""
    entries: Entries = []
    for annotation in sample.annotations:
        shift = rng.integers(-40, 41, 2)
        mask = np.roll(decode_rle(annotation["segmentation"]), shift, (0, 1))
        found = sv.Detections(
            xyxy=sv.mask_to_xyxy(mask[None]).astype(np.float32),
            mask=mask[None],
            class_id=np.array([annotation["category_id"] - 1]),
            confidence=rng.uniform(0.3, 1, 1).astype(np.float32),
        )
        entries += coco_results(sample.image_id, found)
    return entries


def _show(results: dict[str, Any]) -> None:
    table = Table("workload", "way", "ms per image", "CPU ms", "speed-up (quartiles)", "CPU", "kB")
    for workload, rows in results.items():
        for name, row in rows.items():
            ratio, work = row["wall_speed_up"], row["cpu_speed_up"]
            table.add_row(
                workload,
                name,
                f"{row['wall_ms_per_image']['median']:.1f}",
                f"{row['cpu_ms_per_image']['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{work['median']:.2f}",
                str(row["kilobytes"]),
            )
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mvtec-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--category", default="transistor")
    parser.add_argument("--rounds", type=int, default=7, help="of which medians are taken")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-overlay"))
    args = parser.parse_args()
    args.command = shlex.join(["python", "benchmarks/overlay/run.py", "--mvtec-root",
                               "datasets/mvtec_ad", "--category", args.category])  # fmt: skip
    return args


if __name__ == "__main__":
    main()
