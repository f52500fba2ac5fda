"""What made a result: the resolved configuration, versions, revision and input checksums.

Every stage writes `config.yaml` and `begun.json` into its output folder when it begins. At its
end `run.json` takes the place of `begun.json`, so a folder that has it is complete. A result that
is one file, such as `review.mp4`, has one beside it, `review.mp4.json`, with the options as well.

`seconds` in a record is how long the stage took, from `write_config` on (in all, where it was part
of a run); null for a training that was interrupted, since nobody knows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__, resources
from pipeline.config import FOLD, Config, RunConfig, StageConfig, of_fold
from pipeline.data.files import read_json, sha256, write_json, write_text
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


def write_seconds(out: Path, seconds: float | None) -> None:
    """Note in a finished result's record how long it took; None for what was interrupted."""
    path = record_path(out)
    rounded = None if seconds is None else round(seconds, 1)
    write_json(path, {**read_json(path), "seconds": rounded})


def seconds_of(out: Path) -> float | None:
    """How long a finished result took, if its record says so."""
    found: float | None = read_json(record_path(out)).get("seconds")
    return found


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
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        for i, item in enumerate(values):
            found = None if item is None else _fingerprint_of(item)
            if found is not None:
                inputs[name if len(values) == 1 else f"{name}[{i}]"] = found
    return inputs


def _fingerprint_of(item: Path | str) -> str | None:
    """What identifies the file, the folder or the weights of this name, if there are any."""
    if Path(item).exists():
        return fingerprint(Path(item))
    if FOLD in str(item):  # one path for each fold
        paths = (of_fold(Path(item), fold) for fold in itertools.count())
        parts = [fingerprint(path) for path in itertools.takewhile(Path.exists, paths)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else None
    entry = load_registry().get(str(item))
    return entry.sha256 if entry else None


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
    return content.get("signature") if isinstance(content, dict) else None


def claim(out: Path, force: bool) -> None:
    """Make `out` ready to be written. Raises `UserError` if it holds something and not `force`."""
    check_folder(out, force)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "begun.json", *CHECKPOINTS):
        (out / name).unlink(missing_ok=True)


def check_folder(out: Path, force: bool) -> None:
    """Check that the folder `out` may be written. Raises `UserError` if it may not."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}")
    if (out / "run.json").exists() and not force:
        raise UserError(f"--out: {out} holds a finished result; give --force to replace it")
    # A hidden file may be what a killed process has left of ours.
    if not (out / "config.yaml").exists() and any(out.glob("[!.]*")):
        raise UserError(f"--out: expected a new folder or one of ours, found other files in {out}")


def claim_file(out: Path, force: bool) -> None:
    """Check that the file `out` may be written. Raises `UserError` if it exists and not `force`."""
    if out.is_dir():
        raise UserError(f"--out: expected a file, found the folder {out}")
    if out.exists() and not force:
        raise UserError(f"--out: {out} exists; give --force to replace it")


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
