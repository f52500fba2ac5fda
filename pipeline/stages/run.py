"""Run the stages of a configuration in order.

A stage is skipped when its folder holds the finished result of the same options and inputs; a
training that was interrupted goes on from its last checkpoint.

Of one fold, everything but the dataset is under fold<K>/, and so it is of all folds, but for their
common evaluation and video: a run over all folds takes over what was run fold by fold.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import config as configs
from pipeline import record
from pipeline.config import FOLD, SECTIONS, RunConfig, StageConfig, TrainConfig, of_fold
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
        fold = getattr(stage, "fold", None)
        of = "" if fold is None else "all folds, " if fold == "all" else f"fold {fold}, "
        title = f"[bold]{number}/{len(stages)} {of}{command}[/] → {stage.out}"
        console.rule(title, align="left")
        if command == "overlay" and "threshold" not in config.overlay:  # None: one of each fold
            chosen = read_json(folders["evaluate"] / "metrics.json")["threshold"]["value"]
            stage = stage.model_copy(update={"threshold": chosen})
        _run_stage(command, stage)
        folders[command] = stage.out
        following = stages[number][1] if number < len(stages) else None
        if isinstance(fold, int) and getattr(following, "fold", None) != fold:
            console.print(_time_of_fold(fold, stages))
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
    out, fold = config.out, config.fold
    if config.synth is not None:
        synth = {"out": out / "mvtec", **config.synth}
        yield "synth", synth
        source = synth["out"]
    else:
        source = config.mvtec_root / str(config.convert["source"])
    convert = {"out": out / "dataset", **config.convert, "source": source}
    yield "convert", convert
    data = convert["out"]
    models = dict(_models(config, data, out if fold is None else out / f"fold{FOLD}"))
    for k in range(int(convert["folds"])) if fold == "all" else (fold,):
        for section, options in models.items():
            yield section, {"fold": k, **_of_fold(options, k)}
    together = out if fold in (None, "all") else out / f"fold{fold}"
    predictions = models["segment"]["out"]
    evaluate = {
        "data": data,
        "predictions": predictions,
        "truth_boxes": models["segment.truth_boxes"]["out"],
        "classifiers": [
            models[f"finetune_classifier.{n}"]["out"] for n in config.finetune_classifier
        ],
        "out": together / "evaluation",
        **config.evaluate,
    }
    if fold == "all":
        predictions = Path(evaluate["out"]) / "out_of_fold"
    else:
        evaluate, predictions = _of_fold(evaluate, fold), _of_fold({"": predictions}, fold)[""]
    yield "evaluate", {"fold": fold, **evaluate}
    overlay = {
        "source": data,
        "fold": fold,
        "predictions": predictions,
        "evaluation": evaluate["out"],
        "split": config.evaluate.get("split", "test"),
        "out": together / "review.mp4",
        **config.overlay,
    }
    yield "overlay", overlay


def _models(config: RunConfig, data: Path, out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages that each fold has; `out` and the links may have `{fold}` in them."""
    detector = {"data": data, "out": out / "detector", **config.finetune_yolo}
    if config.init is not None:
        detector["model"] = config.init
    yield "finetune_yolo", detector
    segment = {
        "source": data,
        "boxes": str(Path(detector["out"]) / "detector.pt"),
        "out": out / "predictions",
        **config.segment,
    }
    if config.finetune_sam is not None:
        segmenter = {"data": data, "out": out / "segmenter", **config.finetune_sam}
        yield "finetune_sam", segmenter
        segment["sam"] = str(Path(segmenter["out"]) / "sam.safetensors")
    for name, options in config.finetune_classifier.items():
        classifier = {"data": data, "out": out / "classifiers" / name, **options}
        yield f"finetune_classifier.{name}", classifier
    yield "segment", segment
    measured = config.evaluate.get("split", "test")
    truth_boxes = {**segment, "boxes": "truth", "out": out / "truth_boxes", "splits": (measured,)}
    yield "segment.truth_boxes", truth_boxes


def _of_fold(options: dict[str, Any], fold: int | None) -> dict[str, Any]:
    """Options with the number of the fold in all paths."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if not isinstance(value, str | Path) or FOLD not in str(value) or fold is None:
            return value
        return type(value)(of_fold(Path(value), fold))

    return {key: filled(value) for key, value in options.items()}


def _time_of_fold(fold: int, stages: Sequence[tuple[str, StageConfig]]) -> str:
    """How long the stages of a fold took, in words."""
    outs = [stage.out for _, stage in stages if getattr(stage, "fold", None) == fold]
    seconds = [record.seconds_of(out) for out in outs]
    known = sum(value for value in seconds if value is not None) / 60
    if None in seconds:
        return f"fold {fold}: more than {known:.1f} minutes (not all of its stages were timed)"
    return f"fold {fold}: {known:.1f} minutes"


def _run_stage(command: str, stage: StageConfig) -> None:
    if record.is_complete(stage.out, record.signature(command, stage)):
        console.print("up to date")
        return
    changes: dict[str, Any] = {"force": True}
    if isinstance(stage, TrainConfig):
        changes["resume"] = record.can_resume(command, stage)
    module = importlib.import_module(f"pipeline.stages.{command.replace('-', '_')}")
    started = time.monotonic()
    module.run(stage.model_copy(update=changes))
    resumed = changes.get("resume", False)  # how long it took before nobody knows
    record.write_seconds(stage.out, None if resumed else time.monotonic() - started)
