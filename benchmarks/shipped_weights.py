"""Are the weights that ship worth it? Fine-tune on MVTec transistor from them and from scratch.

    python benchmarks/shipped_weights.py --mvtec-root datasets/mvtec_ad

Both runs are `pipeline run configs/transistor-offline.yaml`, with the same data, split, seed and
number of epochs; only the starting points of detector and segmenter differ. The result goes to
benchmarks/shipped_weights.json. An interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
from pathlib import Path
from typing import Any

from pipeline import config, record
from pipeline.data.files import read_json, write_json
from pipeline.stages import run

CONFIG = Path("configs/transistor-offline.yaml")
RESULT = Path("benchmarks/shipped_weights.json")
STARTS = {
    "shipped": {"yolo": "yolo-world-n", "sam": "sam-lite"},
    "scratch": {"yolo": "yolov8n-worldv2.yaml", "sam": "sam-lite-imagenet"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mvtec-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-shipped-weights"))
    arguments = parser.parse_args()
    summary = {
        name: measure(start, arguments.mvtec_root, arguments.out / name)
        for name, start in STARTS.items()
    }
    write_json(
        RESULT,
        {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/shipped_weights.py --mvtec-root datasets/mvtec_ad",
            "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, no GPU",
            "versions": record.versions(),
            "seed": 0,
            "starts": STARTS,
            "summary": summary,
        },
    )
    print(f"result: {RESULT}")


def measure(start: dict[str, str], mvtec_root: Path, out: Path) -> dict[str, Any]:
    """Run the configuration from one pair of starting points and collect its figures."""
    values = config.read_yaml(CONFIG)
    values["finetune_yolo"]["model"] = start["yolo"]
    values["finetune_sam"]["model"] = start["sam"]
    values["finetune_classifier"] = {}
    run.run(config.build(config.RunConfig, {**values, "mvtec_root": mvtec_root, "out": out}))
    metrics = read_json(out / "evaluation" / "metrics.json")
    with (out / "segmenter" / "results.csv").open() as file:
        segmenter_epochs = len(list(csv.DictReader(file)))
    return {
        "box_map50": metrics["box"]["map50"],
        "box_map50_95": metrics["box"]["map50_95"],
        "mask_map50": metrics["mask"]["map50"],
        "truth_boxes_mean_iou": metrics["truth_boxes"]["mean_iou"],
        "image_accuracy": metrics["image_decision"]["detector"]["accuracy"],
        "balanced_accuracy": metrics["image_decision"]["detector"]["balanced_accuracy"],
        "false_alarms_per_good_image": metrics["good_images"]["false_alarms_per_image"],
        "intervals": metrics["intervals"],
        "segmenter_epochs": segmenter_epochs,
    }


if __name__ == "__main__":
    main()
