"""What made a result: the stages it went through, their options, and the weights they began with.

Read from the records that every stage leaves (pipeline/record.py), from a result back to its data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import record
from pipeline.config import FOLD, SECTIONS, of_fold, read_yaml
from pipeline.data.files import read_json
from pipeline.models.weights import load_registry

WEIGHTS = {"boxes": "detector", "sam": "segmenter", "model": "start"}  # options that name them


@dataclass(frozen=True)
class Step:
    """A stage that ran."""

    command: str
    folder: str
    options: dict[str, Any]
    seconds: float | None


@dataclass(frozen=True)
class Weights:
    """Weights that a stage read."""

    role: str
    name: str
    sha256: str
    licence: str  # empty: it made them itself, or does not know them


@dataclass(frozen=True)
class Made:
    steps: list[Step]
    weights: list[Weights]
    versions: dict[str, str]  # of this package, Python and the packages that count


def trace(evaluation: Path, *others: Path) -> Made:
    """Everything that led to an evaluation, and to `others`, as far as it can still be found."""
    steps: dict[Path, Step] = {}
    weights: dict[tuple[str, str], Weights] = {}
    waiting = [evaluation, *others]
    while waiting:
        folder = waiting.pop(0).resolve()
        made = _record(folder)
        if made is None or folder in steps:
            continue
        options = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
        steps[folder] = Step(made.command, str(folder), options, made.seconds)
        for name, path, checksum in _named(made, options):
            if name in WEIGHTS and options.get("pretrained") is not False:
                found = _weights(made.command, name, path, checksum)
                weights.setdefault((found.role, checksum), found)
            if path.is_dir():
                waiting.append(path)
            elif path.is_file():  # of a folder of ours, or of one in it
                waiting += [path.parent, path.parent.parent]
    order = {section.replace("_", "-"): place for place, section in enumerate(SECTIONS)}
    # What is no part of a run, such as another way to make a dataset, comes first.
    ordered = sorted(steps.values(), key=lambda step: (order.get(step.command, -1), step.folder))
    return Made(ordered, list(weights.values()), _versions(_record(evaluation)))


def _record(folder: Path) -> record.Record | None:
    """The record of a finished stage in a folder, if there is one: others have a run.json too."""
    path = folder / "run.json"
    content = read_json(path) if path.is_file() else None
    ours = isinstance(content, dict) and {"command", "inputs"} <= content.keys()
    return record.read(folder) if ours else None


def _named(made: record.Record, options: dict[str, Any]) -> Iterator[tuple[str, Path, str]]:
    """The inputs of a stage that options name: name of the option, path, checksum."""
    for key, checksum in made.inputs.items():
        name, _, place = key.rstrip("]").partition("[")
        value = options.get(name)
        if isinstance(value, list):
            value = value[int(place or 0)]
        if value is None:
            continue
        if FOLD not in str(value):
            yield name, Path(value), checksum
            continue
        paths = (of_fold(Path(value), fold) for fold in itertools.count())
        for path in itertools.takewhile(Path.exists, paths):
            yield name, path, checksum


def _weights(command: str, name: str, path: Path, checksum: str) -> Weights:
    """What is known of weights: those of the registry have a licence."""
    known = next((e for e in load_registry().values() if e.sha256 == checksum), None)
    role = f"start of {command}" if name == "model" else WEIGHTS[name]
    return Weights(role, str(path), checksum, known.licence if known else "")


def _versions(made: record.Record | None) -> dict[str, str]:
    if made is None:
        return {}
    found = {"pipeline": made.pipeline, "revision": made.revision, "python": made.python}
    return {name: value for name, value in {**found, **made.packages}.items() if value}
