"""What made a result: the resolved configuration, versions, revision and input checksums.

Every stage writes `config.yaml` and `begun.json` into its output folder when it begins. At its
end `run.json` takes the place of `begun.json`, so a folder that has it is complete. A training's
folder fills up in its place, so that the training can be resumed; any other stage builds its result
in a work folder, which takes its place when it is complete. A result that is one file, such as
`review.mp4`, has one beside it, `review.mp4.json`, with the options as well.

`seconds` in a record is how long the stage took, from `write_config` on (in all, where it was part
of a run); null for a training that was interrupted, since nobody knows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, NonNegativeFloat

from pipeline import __version__, resources
from pipeline.config import FOLD, Config, RunConfig, StageConfig, flag_of, of_fold
from pipeline.data import stored
from pipeline.data.files import atomic_folder, read_json, sha256, write_json, write_text
from pipeline.data.stored import Stored
from pipeline.errors import UserError
from pipeline.models.weights import load_registry

FILES = (".mp4", ".webm", ".gif", ".csv")  # results that are one file; all others are folders
WITHOUT_EFFECT = {  # on results
    "out", "force", "resume", "device", "offline", "cache", "cache_gb", "tensorboard", "mlflow",
}  # fmt: skip
CHECKPOINTS = ("last.pt", "weights/last.pt")  # what an interrupted training goes on from
PACKAGES = (
    "torch",
    "torchvision",
    "ultralytics",
    "segment-anything",
    "supervision",
    "albumentations",
    "opencv-python",
    "pycocotools",
    "timm",
    "av",
    "numpy",
    "peft",
    "scikit-learn",
    "lightly",
    "zuko",
)


def write_config(out: Path, command: str, config: StageConfig | RunConfig) -> None:
    """Write the resolved configuration and, for `can_resume`, what the result will depend on."""
    _write_options(out, command, config)
    if isinstance(config, StageConfig):
        begun = {"signature": signature(command, config), "started": time.time()}
        write_json(out / "begun.json", begun)


def _write_options(out: Path, command: str, config: StageConfig | RunConfig) -> None:
    """Write the resolved configuration, whose first line is the command that runs it."""
    flag = "" if "config" in config.positional else "--config "
    first = f"# pipeline {command} {flag}{shlex.quote(str(config.out / 'config.yaml'))}\n"
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(out / "config.yaml", first + text)


def can_resume(command: str, config: StageConfig) -> bool:
    """Whether a training with these very options and inputs was interrupted after a checkpoint."""
    has_checkpoint = any((config.out / name).is_file() for name in CHECKPOINTS)
    begun = _signature_in(config.out / "begun.json")
    return has_checkpoint and begun == signature(command, config)


def record_path(out: Path) -> Path:
    """Where the record of a result is: in the folder, or beside the file."""
    return out.with_name(f"{out.name}.json") if out.suffix.lower() in FILES else out / "run.json"


def write_record(out: Path, command: str, config: StageConfig, **more: Any) -> None:
    """Mark `out` as complete, with what it was made from, and what `more` there is to know."""
    record, inputs = record_path(out), inputs_of(config)
    options: dict[str, Any] = {}
    if record.parent == out:
        _write_options(out, command, config)
        options["files"] = sorted({path.name for path in out.iterdir()} - {"begun.json"})
    else:  # a file has no folder of its own for a config.yaml
        options["options"] = config.model_dump(mode="json")
    write_json(
        record,
        {
            "command": command,
            **options,
            "signature": _sign(command, config, inputs),
            "inputs": inputs,
            **versions(),
            "seconds": _seconds_since_begun(out, config),
            **more,
        },
    )
    if record.parent == out:
        (out / "begun.json").unlink(missing_ok=True)


def _seconds_since_begun(out: Path, config: StageConfig) -> float | None:
    """How long ago `write_config` was; None without it, and for what was interrupted since."""
    path = out / "begun.json"
    if getattr(config, "resume", False) or not path.is_file():
        return None
    return round(time.time() - float(read_json(path)["started"]), 1)


class Record(Stored):
    """What is read of a finished result's record."""

    command: str
    inputs: dict[str, str] = Field(default_factory=dict)
    seconds: NonNegativeFloat | None = None
    seconds_per_image: NonNegativeFloat | None = None  # of a classifier
    pipeline: str | None = None
    revision: str | None = None
    python: str | None = None
    packages: dict[str, str | None] = Field(default_factory=dict)


def read(out: Path) -> Record:
    """The record of a finished result. Raises `UserError` when there is none."""
    return stored.read(record_path(out), Record, "the record of a finished result")


def write_seconds(out: Path, seconds: float | None) -> None:
    """Note in a finished result's record how long it took; None for what was interrupted."""
    path = record_path(out)
    rounded = None if seconds is None else round(seconds, 1)
    write_json(path, {**read_json(path), "seconds": rounded})


def seconds_of(out: Path) -> float | None:
    """How long a finished result took, if its record says so."""
    return read(out).seconds


def versions() -> dict[str, Any]:
    """What is running: this package and its revision, Python, and the packages that count."""
    return {
        "pipeline": __version__,
        "revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def inputs_of(config: Config) -> dict[str, str]:
    """Fingerprints of the files, folders and known weights that options name, by option."""
    inputs: dict[str, str] = {}
    for name in config.inputs:
        values = _values_of(config, name)
        for i, item in enumerate(values):
            if (found := _fingerprint_of(item)) is not None:
                inputs[name if len(values) == 1 else f"{name}[{i}]"] = found
    return inputs


def _values_of(config: Config, name: str) -> tuple[Path | str, ...]:
    """What an option that names inputs names: none, one or several."""
    value = getattr(config, name)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _fingerprint_of(item: Path | str) -> str | None:
    """What identifies the file, the folder or the weights of this name, if there are any."""
    paths = _paths_of(item)
    if paths == [Path(item)]:
        return fingerprint(Path(item))
    if paths:
        parts = [fingerprint(path) for path in paths]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    entry = load_registry().get(str(item))
    return entry.sha256 if entry else None


def _paths_of(item: Path | str) -> list[Path]:
    """The file or folder of this name, or those of all folds, as far as they exist."""
    path = Path(item)
    if path.exists() or FOLD not in str(item):
        return [path] if path.exists() else []
    return list(itertools.takewhile(Path.exists, (of_fold(path, k) for k in itertools.count())))


def signature(command: str, config: Config) -> str:
    """One hash of everything a stage's result depends on; where it goes to does not count."""
    return _sign(command, config, inputs_of(config))


def _sign(command: str, config: Config, inputs: dict[str, str]) -> str:
    options = config.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    found = {name.split("[")[0] for name in inputs}  # of these the content counts, not the path
    options = {key: value for key, value in options.items() if key not in found}
    state = [__version__, command, options, inputs]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """What identifies an input: a file's sha256, a finished run's signature, a folder's content."""
    if path.is_file():
        return sha256(path)
    if made := _signature_in(path / "run.json"):
        return made
    files = sorted(file for file in path.rglob("*") if file.is_file())
    content = [(file.relative_to(path).as_posix(), sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_complete(out: Path, wanted: str) -> bool:
    """Whether `out` holds the finished result with this signature."""
    return out.exists() and _signature_in(record_path(out)) == wanted


def _signature_in(record: Path) -> str | None:
    """The signature in a record of ours, if it is one."""
    content = read_json(record) if record.is_file() else None
    found = content.get("signature") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


# ---- Where results go ---------------------------------------------------------------------------


@contextmanager
def result(command: str, config: StageConfig) -> Iterator[Path]:
    """Yield a folder for a result, for `write_record` to complete, that then becomes `config.out`.

    If the block raises, what was there stays as it was. Raises `UserError` as `check_out` does.
    """
    check_out(command, config)
    _check_nothing_else(config.out)
    with atomic_folder(config.out) as folder:
        write_config(folder, command, config)
        yield folder


def claim(command: str, config: StageConfig | RunConfig) -> None:
    """Make `config.out` ready for what is written in its place, a training or a run.

    Raises `UserError` as `check_out` does.
    """
    check_out(command, config)
    config.out.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "begun.json", *CHECKPOINTS):
        (config.out / name).unlink(missing_ok=True)


def check_out(command: str, config: StageConfig | RunConfig) -> None:
    """Check that the result of a command may be written.

    Raises `UserError` if it would take the place of an input, of something that is no result of
    this command or, without `force`, of a finished one.
    """
    out, force = config.out, getattr(config, "force", False)
    for name in config.inputs:
        paths = [path for item in _values_of(config, name) for path in _paths_of(item)]
        if any(path.resolve().is_relative_to(out.resolve()) for path in paths):
            flag = flag_of(type(config), name)
            raise UserError(f"--out: expected a place apart from {flag}, found {out}")
    if out.suffix.lower() in FILES:
        _check_file(out, force)
    else:
        _check_folder(out, command, force)


def _check_file(out: Path, force: bool) -> None:
    if out.is_dir():
        raise UserError(f"--out: expected a file, found the folder {out}")
    if out.exists() and not force:
        raise UserError(f"--out: {out} exists; give --force to replace it")


def _check_folder(out: Path, command: str, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}")
    found = _command_of(out)
    # A hidden file may be what a killed process has left of ours.
    if found is None and any(out.glob("[!.]*")):
        raise UserError(f"--out: expected a new folder or one of ours, found other files in {out}")
    if found not in (None, command):
        raise UserError(f"--out: expected a new folder or one of {command}, found {found}'s {out}")
    if (out / "run.json").exists() and not force:
        raise UserError(f"--out: {out} holds a finished result; give --force to replace it")


def _command_of(out: Path) -> str | None:
    """The command that the first line of a folder's config.yaml names, if it has one."""
    path = out / "config.yaml"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.match(r"# pipeline (\S+)", file.readline())
    return found[1] if found else None


def _check_nothing_else(out: Path) -> None:
    """Raise `UserError` for a finished result that someone has put something beside."""
    path = out / "run.json"
    made = read_json(path) if path.is_file() else None
    if not isinstance(made, dict) or not isinstance(made.get("files"), list):
        return
    known = {*map(str, made["files"]), "run.json"}
    if others := sorted({path.name for path in out.glob("[!.]*")} - known):
        raise UserError(
            f"--out: expected nothing but the result to replace in {out}, found {others[0]}"
        )


# ---- What is running ----------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The checkout's revision, with `+` if it has changes; None outside a checkout."""
    if not resources.in_checkout():  # an installed package may lie in some other checkout
        return None
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
