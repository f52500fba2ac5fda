"""Train one of the detectors that ours is compared with, as Ultralytics does by default.

    python benchmarks/detection/baselines.py yolov8n_default --config FILE --force

FILE has the options of `pipeline finetune-yolo`. Of these, data, fold, model, epochs, image_size,
seed and device count; all else is Ultralytics' own default. Output folder: detector.pt,
run.json, training/ (Ultralytics' own folder).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import common
from pipeline import config
from pipeline.config import FinetuneYoloConfig
from pipeline.data.dataset import Dataset, split_name
from pipeline.data.files import write_text
from pipeline.models import yolo_world
from pipeline.models.device import device_name
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages.finetune_yolo import DETECTOR

TRAINING = "training"
BEST = Path(TRAINING, "weights", "best.pt")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("method", choices=BASELINES)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--force", action="store_true", required=True, help="replaces what is there"
    )
    arguments = parser.parse_args(argv)
    with common.problems_as_lines(Path(__file__).name):
        values = config.read_yaml(arguments.config)
        options = config.build(FinetuneYoloConfig, values, file=arguments.config)
        out = options.out
        (out / "run.json").unlink(missing_ok=True)
        shutil.rmtree(out / TRAINING, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        BASELINES[arguments.method](options)
        common.finish(out, arguments.method, options)


def train_yolov8n(options: FinetuneYoloConfig) -> None:
    """What `yolo train model=MODEL data=foldK.yaml epochs=... imgsz=...` does."""
    from ultralytics import YOLO  # not earlier: our modules keep it to itself

    threads = torch.get_num_threads()
    model = YOLO(options.model, task="detect")
    # Ultralytics leaves one core idle; the times are compared, so all use as many.
    model.add_callback("on_train_start", lambda trainer: torch.set_num_threads(threads))
    model.train(data=str(options.data / f"fold{options.fold}.yaml"), **_given(options))
    (options.out / BEST).replace(options.out / DETECTOR)


def train_yolo_world(options: FinetuneYoloConfig) -> None:
    """YOLO-World of a plain YOLOv8's weights, with learned prompts, for there is no CLIP."""
    dataset = Dataset(options.data)
    torch.manual_seed(options.seed)  # what a plain YOLOv8 lacks begins at random
    model = yolo_world.load_model(options.model, offline=True)
    model = yolo_world.set_prompts(model, dataset.classes, None, options.seed)
    start, data = options.out / "start.pt", options.out / "data.yaml"
    yolo_world.save_checkpoint(model, start)
    fold = options.fold
    content = {
        "path": str(dataset.root.resolve()),
        **{part: f"{split_name(part, fold)}.txt" for part in ("train", "val")},
        "splits": {part: [part, fold] for part in ("train", "val")},
        "names": dict(enumerate(dataset.classes)),
    }
    write_text(data, yaml.safe_dump(content, sort_keys=False))
    given = {"model": str(start), "data": str(data), **_given(options)}
    PromptTrainer(overrides=given).train()
    yolo_world.finish_checkpoint(options.out / BEST, options.out / DETECTOR)
    start.unlink()


def _given(options: FinetuneYoloConfig) -> dict[str, Any]:
    """All that Ultralytics is told beside the model and the data."""
    return {
        "epochs": options.epochs,
        "imgsz": options.image_size,
        "seed": options.seed,
        "device": device_name(options.device),
        "project": str(options.out.resolve()),
        "name": TRAINING,
        "plots": False,
    }


BASELINES = {"yolov8n_default": train_yolov8n, "yolo_world_default": train_yolo_world}

if __name__ == "__main__":
    main()
