"""What made a result: the resolved configuration, versions, revision and input checksums.

Every stage writes `config.yaml` and `run.json` into its output folder; `run.json` comes last, so a
folder that has it is complete. A video `review.mp4` has one file beside it, `review.mp4.json`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import yaml

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.files import read_json, sha256, write_json, write_text
from pipeline.errors import UserError

PACKAGES = (
    "torch torchvision ultralytics segment-anything supervision albumentations opencv-python "
    "pycocotools timm av numpy"
).split()


def write_config(out: Path, command: str, config: Config) -> None:
    """Write the resolved configuration, whose first line is the command that runs it."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(out / "config.yaml", f"# pipeline {command} --config config.yaml\n{text}")


def was_begun(out: Path, config: Config) -> bool:
    """Whether a run with this very configuration was begun in `out` and not finished."""
    path = out / "config.yaml"
    if not path.is_file() or record_path(out).exists():
        return False
    volatile = {"force", "resume"}
    begun = {k: v for k, v in (yaml.safe_load(path.read_text()) or {}).items() if k not in volatile}
    return begun == config.model_dump(mode="json", exclude=volatile)


def record_path(out: Path) -> Path:
    """Where the record of a result is: in the folder, or beside the video."""
    return out.with_name(f"{out.name}.json") if out.suffix.lower() == ".mp4" else out / "run.json"


def write_record(out: Path, command: str, config: Config) -> None:
    """Mark `out` as complete, with what it was made from."""
    inputs = inputs_of(config)
    record = record_path(out)
    if record.parent == out:
        write_config(out, command, config)
    write_json(
        record,
        {
            "command": command,
            "signature": signature(command, config),
            "inputs": inputs,
            "pipeline": __version__,
            "revision": _git_revision(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
        },
    )


def inputs_of(config: Config) -> dict[str, str]:
    """Fingerprints of the files and folders that a configuration names, by option."""
    inputs: dict[str, str] = {}
    for name in config.inputs:
        value = getattr(config, name)
        paths = value if isinstance(value, tuple) else (value,)
        for i, path in enumerate(paths):
            if path is not None and Path(path).exists():
                inputs[name if len(paths) == 1 else f"{name}[{i}]"] = fingerprint(Path(path))
    return inputs


def signature(command: str, config: Config) -> str:
    """One hash of everything a stage's result depends on; where it goes to does not count."""
    inputs = inputs_of(config)
    options = config.model_dump(
        mode="json", exclude={"out", "force", "resume", "device", "offline"}
    )
    found = {name.split("[")[0] for name in inputs}  # of these the content counts, not the path
    options = {key: value for key, value in options.items() if key not in found}
    state = [__version__, command, options, inputs]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """What identifies an input: a file's sha256, a finished run's signature, a listing of a folder."""
    if path.is_file():
        return sha256(path)
    if (path / "run.json").is_file():
        return str(read_json(path / "run.json")["signature"])
    listing = sorted(
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    )
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def is_complete(out: Path, wanted: str) -> bool:
    """Whether `out` holds the finished result with this signature."""
    record = record_path(out)
    return record.is_file() and read_json(record).get("signature") == wanted


def claim(out: Path, force: bool) -> None:
    """Make `out` ready to be written. Raises `UserError` if it holds something and not `force`."""
    if out.is_file():
        raise UserError(f"--out: expected a folder, found the file {out}")
    if (out / "run.json").exists():
        if not force:
            raise UserError(f"--out: {out} holds a finished result; give --force to replace it")
        (out / "run.json").unlink()
    elif out.is_dir() and any(out.iterdir()) and not (out / "config.yaml").exists():
        raise UserError(f"--out: expected a new folder or one of ours, found other files in {out}")
    out.mkdir(parents=True, exist_ok=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The checkout's revision, with `+` if it has changes; None outside a checkout."""
    command = "git describe --always --dirty=+ --abbrev=12".split()
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
