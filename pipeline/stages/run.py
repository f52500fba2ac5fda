"""Run the stages of a configuration in order.

A stage is skipped when its folder holds the finished result of the same options and inputs; a
training that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import config as configs
from pipeline import record
from pipeline.config import SECTIONS, RunConfig, StageConfig, TrainConfig
from pipeline.data import report
from pipeline.data.files import read_json
from pipeline.errors import UserError

console = Console()


def run(config: RunConfig) -> None:
    stages = plan(config)
    started = time.monotonic()
    record.claim(config.out, force=False)
    record.write_config(config.out, "run", config)
    folders: dict[str, Path] = {}
    for number, (command, stage) in enumerate(stages, start=1):
        console.rule(f"[bold]{number}/{len(stages)} {command}[/] → {stage.out}", align="left")
        if command == "overlay" and "threshold" not in config.overlay:
            chosen = read_json(folders["evaluate"] / "metrics.json")["threshold"]["value"]
            stage = stage.model_copy(update={"threshold": chosen})
        _run_stage(command, stage)
        folders[command] = stage.out
    console.rule("[bold]results", align="left")
    report.show(read_json(folders["evaluate"] / "metrics.json"))
    console.print(f"report: {folders['evaluate'] / 'report.md'}", soft_wrap=True)
    console.print(f"video:  {folders['overlay']}", soft_wrap=True)
    console.print(f"time:   {time.monotonic() - started:.0f} s")


def plan(config: RunConfig) -> list[tuple[str, StageConfig]]:
    """The commands to run and their configurations, in order.

    Raises `UserError` with the problems of all sections.
    """
    planned: list[tuple[str, StageConfig]] = []
    problems: list[str] = []
    for section, values in _stages(config):
        name = section.split(".")[0]
        try:
            stage = configs.build(SECTIONS[name], values, section=f"{section}.")
            planned.append((name.replace("_", "-"), stage))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return planned


def _stages(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage's section in the file, and its options with the links filled in."""
    out = config.out
    if config.synth is not None:
        synth = {"out": out / "mvtec", **config.synth}
        yield "synth", synth
        source = synth["out"]
    else:
        source = config.mvtec_root / str(config.convert["source"])
    convert = {"out": out / "dataset", **config.convert, "source": source}
    yield "convert", convert
    data = {"data": convert["out"], "fold": config.fold}
    detector = {**data, "out": out / "detector", **config.finetune_yolo}
    if config.init is not None:
        detector["model"] = config.init
    yield "finetune_yolo", detector
    segment = {
        "source": convert["out"],
        "fold": config.fold,
        "boxes": str(Path(detector["out"]) / "weights" / "best.pt"),
        "out": out / "predictions",
        **config.segment,
    }
    if config.finetune_sam is not None:
        segmenter = {**data, "out": out / "segmenter", **config.finetune_sam}
        yield "finetune_sam", segmenter
        segment["sam"] = str(Path(segmenter["out"]) / "sam.safetensors")
    classifiers = []
    for name, options in config.finetune_classifier.items():
        classifier = {**data, "out": out / "classifiers" / name, **options}
        yield f"finetune_classifier.{name}", classifier
        classifiers.append(classifier["out"])
    yield "segment", segment
    measured = config.evaluate.get("split", "test")
    truth_boxes = {**segment, "boxes": "truth", "out": out / "truth_boxes", "splits": (measured,)}
    yield "segment", truth_boxes
    evaluate = {
        **data,
        "predictions": segment["out"],
        "truth_boxes": truth_boxes["out"],
        "classifiers": classifiers,
        "out": out / "evaluation",
        **config.evaluate,
    }
    yield "evaluate", evaluate
    overlay = {
        "source": convert["out"],
        "fold": config.fold,
        "predictions": segment["out"],
        "split": measured,
        "out": out / "review.mp4",
        **config.overlay,
    }
    yield "overlay", overlay


def _run_stage(command: str, stage: StageConfig) -> None:
    if record.is_complete(stage.out, record.signature(command, stage)):
        console.print("up to date")
        return
    changes: dict[str, Any] = {"force": True}
    if isinstance(stage, TrainConfig):
        changes["resume"] = record.can_resume(command, stage)
    module = importlib.import_module(f"pipeline.stages.{command.replace('-', '_')}")
    module.run(stage.model_copy(update=changes))
