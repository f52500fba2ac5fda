"""What the benchmarks share: data, trainings in processes of their own, bars, where it ran."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
import torch
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pipeline import record
from pipeline.config import ConvertConfig, StageConfig
from pipeline.data.dataset import Dataset
from pipeline.data.files import atomic_path, read_json, write_json, write_text
from pipeline.errors import UserError
from pipeline.stages import convert

# A stage to run: the words of Python's command line, of which the last is the stage's name, and
# the stage's options.
Stage = tuple[Sequence[str], StageConfig]
Bar = tuple[float, tuple[float, float]]  # a figure and its interval


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options that the benchmarks on MVTec AD share; `name` is that of the folder."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--mvtec-root", type=Path, required=True, help="holds the category")
    parser.add_argument("--work", type=Path, default=Path(f"runs/benchmark-{name}"))
    parser.add_argument("--add", action="store_true", help="keep the other rows of results.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    return parser


@contextmanager
def problems_as_lines(program: str) -> Iterator[None]:
    """End the program with exit code 2 and one line for each problem of a `UserError`."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            print(f"{program}: {problem}", file=sys.stderr)
        sys.exit(2)


def converted(options: ConvertConfig) -> Dataset:
    """The dataset, converted anew only if it is not there."""
    if not record.is_complete(options.out, record.signature("convert", options)):
        convert.run(options.model_copy(update={"force": True}))
    return Dataset(options.out)


# ---- Stages in processes of their own ----------------------------------------------------------


def pipeline(command: str) -> Sequence[str]:
    """The words of Python's command line that run a command of ours."""
    return ("-m", "pipeline", command)


def run_stages(stages: Sequence[Stage], jobs: int) -> None:
    """Run the stages, `jobs` at a time, each with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda stage: run_stage(stage, threads), stages))


def run_stage(stage: Stage, threads: int) -> None:
    """Run one, unless its result is there; its output goes to a log beside the result.

    Raises `UserError` when it fails.
    """
    words, options = stage
    name, out = words[-1], options.out
    if record.is_complete(out, record.signature(name, options)):
        return
    resume = record.can_resume(name, options)
    written, log = out.with_name(f"{out.name}.yaml"), out.with_name(f"{out.name}.log")
    values = options.model_dump(mode="json", exclude={"force", "resume"})
    write_text(written, yaml.safe_dump(values, sort_keys=False))
    print(f"{name} {out}, see {log}", flush=True)
    arguments = ["--config", str(written), "--resume" if resume else "--force"]
    started = time.monotonic()
    with log.open("a" if resume else "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *words, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    if done.returncode:
        raise UserError(f"{log}: expected {name} to end well, found that it failed; see there why")
    seconds = None if resume else round(time.monotonic() - started, 1)
    write_json(_timing_file(out), {"seconds": seconds, "threads": threads})


def timing_of(out: Path) -> dict[str, Any]:
    """How long a stage took, its start included (null if it was interrupted), and its threads."""
    path = _timing_file(out)
    timing: dict[str, Any] = {"seconds": None, "threads": None}
    return timing | read_json(path) if path.is_file() else timing


def finish(out: Path, name: str, options: StageConfig) -> None:
    """Mark the result of a benchmark's own stage as complete, as `pipeline` marks its own."""
    signature = record.signature(name, options)
    write_json(out / "run.json", {"command": name, "signature": signature, **record.versions()})


def _timing_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.seconds.json")


# ---- Results -----------------------------------------------------------------------------------


MADE_BY = ("date", "command", "machine", "versions")


def made_by(command: str) -> dict[str, Any]:
    """When, how and where results were made: the keys `MADE_BY`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, {gpu}",
        "versions": record.versions(),
    }


def check_joins(path: Path, about: Mapping[str, Any]) -> None:
    """Raise `UserError` if rows cannot join the earlier result at `path`, which is of other data.

    `about` has what both must agree in, where both know it.
    """
    before = read_json(path) if path.is_file() else {}
    problems = [
        f"{path}: expected {key} {value!r}, found {before[key]!r}"
        for key, value in about.items()
        if None not in (value, before.get(key)) and value != before[key]
    ]
    if problems:
        raise UserError(*problems)


def joined(path: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, beside the rows of an earlier result at `path`, if there is one."""
    return join(read_json(path), measured) if path.is_file() else measured


def join(before: Mapping[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """What was measured, beside the rows of `summary` that an earlier result also has.

    What only the earlier one knows is taken over. `earlier` says when and how older rows were made.
    """
    kept = {key: row for key, row in before["summary"].items() if key not in measured["summary"]}
    runs = [{**run, "rows": [r for r in run["rows"] if r in kept]} for run in before["earlier"]]
    told = {row for run in runs for row in run["rows"]}
    last = {key: before[key] for key in MADE_BY}
    runs.append({**last, "rows": [row for row in kept if row not in told]})
    result = {key: before.get(key) if value is None else value for key, value in measured.items()}
    result["earlier"] = [run for run in runs if run["rows"]]
    result["summary"] = {**kept, **measured["summary"]}
    return result


def plot_bars(
    path: Path, bars: Mapping[str, Mapping[str, Bar]], colours: Mapping[str, str], label: str
) -> None:
    """Bars of 0 to 1 with their intervals: a group for each key of `bars`, a bar for each kind.

    `colours` has the kinds in their order; `label` says what the bars show.
    """
    kinds = [kind for kind in colours if any(kind in group for group in bars.values())]
    thickness = 0.8 / len(kinds)
    height = 1.2 + len(bars) * (0.2 + 0.2 * len(kinds))
    figure, axis = plt.subplots(figsize=(8, height))
    for k, kind in enumerate(kinds):
        places = [g for g, group in enumerate(bars.values()) if kind in group]
        places = np.array(places) + (k - (len(kinds) - 1) / 2) * thickness
        shown = [group[kind] for group in bars.values() if kind in group]
        values = np.array([value for value, _ in shown])
        low, high = np.array([interval for _, interval in shown]).T
        axis.barh(places, values, thickness, color=colours[kind], label=kind.replace("_", " "))
        axis.errorbar(
            values,
            places,
            xerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
        for place, value in zip(places, values, strict=True):
            axis.text(1.01, place, f"{value:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel=label)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
    save_plot(figure, path)


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, of equal bytes on equal input, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
