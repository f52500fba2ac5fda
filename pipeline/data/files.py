"""Reading, writing and hashing files. Every write is atomic: a temporary sibling, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, with its suffix, that becomes `path` at the end.

    If the block raises, the temporary file goes and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files; results are for everyone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def unnamed_path(path: Path) -> Iterator[Path]:
    """Like `atomic_path`, for what is long in the making: a process that is killed leaves nothing.

    On Linux the file has no name before it is complete (open(2), O_TMPFILE): what is yielded is a
    path of /proc, without a suffix. Where the system cannot do that, this is `atomic_path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o644)
    except (AttributeError, OSError):
        with atomic_path(path) as temporary:
            yield temporary
        return
    try:
        unnamed = Path(f"/proc/self/fd/{handle}")
        yield unnamed
        # A link cannot take the place of a file; and only with a src_dir_fd, which an absolute path
        # does not need, does Python ask the system to follow the link in /proc.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            named = Path(folder) / path.name
            os.link(unnamed, named, src_dir_fd=handle, follow_symlinks=True)
            named.replace(path)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; if the block succeeds it takes the place of `path`.

    A folder cannot be replaced in one step. Should the process die between the two renames, the old
    one is `.<name>.old`, and the next call puts it back.
    """
    path = path.resolve()  # of a link to a folder, the folder is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises `UserError` when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found nothing there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON file, found {error}") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_image(path: Path) -> np.ndarray:
    """Read an image of any depth and channel count as (height, width, 3) uint8 BGR.

    16-bit images keep their upper byte. Raises `UserError` when OpenCV cannot decode the file.
    """
    image = decode(path, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    return (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image


def decode(path: Path, flags: int) -> np.ndarray:
    """Decode an image file with OpenCV. Raises `UserError` when it cannot be read."""
    try:  # through a buffer: cv2.imread cannot open every Unicode path and prints its own warnings
        buffer = np.fromfile(path, np.uint8)
        image = cv2.imdecode(buffer, flags) if buffer.size else None
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image, found nothing there") from None
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise UserError(f"{path}: expected an image, found a file that cannot be decoded")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: expected an 8- or 16-bit image, found {image.dtype}")
    return image


def list_images(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted by name; hidden files are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
