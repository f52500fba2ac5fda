"""Does a review make the next detector better? The whole loop on rendered transistors.

    python benchmarks/review_loop/run.py

A detector is weakened on purpose: most of its training images have lost their labels, so that it is
trained to see nothing there. It is run on those images; a scripted reviewer, who knows the hidden
truth, judges what it says; `pipeline apply-review` makes a new version of the dataset, and a
detector is trained on it as the first one was. Both are measured on the same test images, whose
labels are complete, beside one that was trained on the complete labels.

results.json and results.md go beside this file. An interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.review_loop import reviewer
from pipeline.config import (
    ApplyReviewConfig,
    ConvertConfig,
    EvaluateConfig,
    FinetuneYoloConfig,
    SegmentConfig,
    StageConfig,
    SynthConfig,
)
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json, write_text

HERE = Path(__file__).parent
SIZE = 320  # pixels, of the rendered images and of what the detector sees
EPOCHS = 12
REVIEWED_FROM = 0.1  # score of the predictions that are shown to the reviewer
COMMAND = "python benchmarks/review_loop/run.py"
DETECTORS = {
    "weakened": "trained on the dataset that lacks most labels",
    "after the review": "trained on the new version",
    "complete labels": "trained on what the first dataset had before its labels were hidden",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-review-loop"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    with common.problems_as_lines("benchmarks/review_loop/run.py"):
        runs = [loop(arguments.out / f"seed{seed}", seed) for seed in arguments.seeds]
    result = {
        **common.made_by(COMMAND),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "settings": {
            "size": SIZE,
            "labelled_images_per_class": reviewer.KEPT,
            "epochs": EPOCHS,
            "reviewed_from_score": REVIEWED_FROM,
            "hand": reviewer.HAND,
        },
        "detectors": DETECTORS,
        "seeds": dict(zip(map(str, arguments.seeds), runs, strict=True)),
    }
    write_json(HERE / "results.json", result)
    write_text(HERE / "results.md", _table(result))
    print((HERE / "results.md").read_text(encoding="utf-8"))


def loop(out: Path, seed: int) -> dict[str, Any]:
    """The loop once: the figures of each detector, and what the review said."""
    mvtec, complete, weak, better = (out / n for n in ("mvtec", "complete", "weak", "reviewed"))
    _run("synth", SynthConfig(
        out=mvtec, train_good=40, test_good=20, per_defect=24, size=SIZE, seed=seed
    ))  # fmt: skip
    _run("convert", ConvertConfig(
        source=mvtec, out=complete, fractions=(0.5, 0.1, 0.4), seed=seed
    ))  # fmt: skip
    if not (weak / "manifest.json").is_file():
        reviewer.hide_labels(complete, weak, seed)
    _run("finetune-yolo", _training(weak, out / "weak-detector", seed))
    _run("segment", SegmentConfig(
        source=weak, splits=("train",), boxes=str(out / "weak-detector" / "detector.pt"),
        min_score=REVIEWED_FROM, out=out / "to-review",
    ))  # fmt: skip
    reviewer.review(complete, weak, out / "to-review", out / "review.json", seed)
    _run("apply-review", ApplyReviewConfig(review=out / "review.json", data=weak, out=better))
    _run("finetune-yolo", _training(better, out / "better-detector", seed))
    _run("finetune-yolo", _training(complete, out / "complete-detector", seed))
    detectors = dict(zip(DETECTORS, ("weak", "better", "complete"), strict=True))
    return {
        "labels": {
            name: sum(len(s.annotations) for s in Dataset(data).split("train"))
            for name, data in zip(DETECTORS, (weak, better, complete), strict=True)
        },
        "review": read_json(better / "manifest.json")["reviews"][-1]["summary"],
        "test": {name: measure(complete, out, f"{d}-detector") for name, d in detectors.items()},
    }


def _training(data: Path, out: Path, seed: int) -> FinetuneYoloConfig:
    """The same for all detectors, but for the labels."""
    return FinetuneYoloConfig(
        data=data, out=out, model="yolo-world-n", epochs=EPOCHS, image_size=SIZE, seed=seed,
        text="learned", unseen_prompts=(), offline=True,
    )  # fmt: skip


def measure(data: Path, out: Path, detector: str) -> dict[str, Any]:
    """A detector's figures on the test images of the complete dataset."""
    found, measured = out / f"{detector}-predictions", out / f"{detector}-evaluation"
    _run("segment", SegmentConfig(
        source=data, boxes=str(out / detector / "detector.pt"), min_score=0.05, max_boxes=5,
        flip=False, out=found,
    ))  # fmt: skip
    _run("evaluate", EvaluateConfig(data=data, predictions=found, out=measured, published=False))
    metrics = read_json(measured / "metrics.json")
    return {
        "box_map50": metrics["box"]["map50"],
        "box_map50_interval": metrics["intervals"]["box.map50"],
        "mask_map50": metrics["mask"]["map50"],
        "false_alarms_per_good_image": metrics["good_images"]["false_alarms_per_image"],
        "training_seconds": common.timing_of(out / detector)["seconds"],
    }


def _run(command: str, options: StageConfig) -> None:
    common.run_stage(
        (common.pipeline(command), options), int(os.environ.get("OMP_NUM_THREADS") or 0) or 2
    )


# ---- Results -----------------------------------------------------------------------------------


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| seed | detector | labels in training | box mAP50 | 95 % interval | mask mAP50 | "
        "false alarms per good image |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for seed, run in result["seeds"].items():
        for name, test in run["test"].items():
            low, high = test["box_map50_interval"]
            lines.append(
                f"| {seed} | {name} | {run['labels'][name]} | {test['box_map50']:.2f} | "
                f"{low:.2f} to {high:.2f} | {test['mask_map50']:.2f} | "
                f"{test['false_alarms_per_good_image']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
