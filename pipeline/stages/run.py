"""Run the stages of a configuration in order.

A stage is skipped when its folder holds the finished result of the same options and inputs; a
training that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import record
from pipeline.config import RunConfig, StageConfig, TrainConfig
from pipeline.data import report
from pipeline.data.files import read_json
from pipeline.plan import plan

console = Console()


def run(config: RunConfig) -> None:
    stages = plan(config)
    started = time.monotonic()
    record.claim("run", config)
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
    console.print(f"tables: {folders['evaluate'] / 'report.md'}", soft_wrap=True)
    console.print(f"video:  {folders['overlay']}", soft_wrap=True)
    console.print(f"report: {folders['report'] / 'index.html'}", soft_wrap=True)
    console.print(f"time:   {time.monotonic() - started:.0f} s")


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
