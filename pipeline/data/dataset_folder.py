"""Writing a whole dataset folder, as `pipeline.data.dataset` describes it, in one step.

It is built in a work folder beside its place and moved there when it is complete.
"""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import cv2
from rich.table import Table

from pipeline import record
from pipeline.config import StageConfig
from pipeline.data.coco import Item, write_split, write_truth
from pipeline.data.dataset import GOOD
from pipeline.data.files import atomic_folder, read_image
from pipeline.data.splits import Split
from pipeline.errors import UserError

FOLDERS = ("images", "labels", "annotations")
MANIFEST = "manifest.json"
RECORD = ("config.yaml", "run.json")  # of `pipeline.record`: they say when and where it was made
Counts = dict[str, dict[str, dict[str, int]]]  # split -> class -> images and instances


def check_apart(out: Path, read: Mapping[str, Path]) -> None:
    """Raise `UserError` if the output is in what is read, by flag, or around it."""
    place = out.resolve()
    for flag, path in read.items():
        other = path.resolve()
        if other.is_relative_to(place) or place.is_relative_to(other):
            raise UserError(f"--out: expected a folder apart from {flag}, found {place}")


def not_ours(out: Path) -> list[str]:
    """Why a folder cannot be an output, if so."""
    if out.exists() and not out.is_dir():
        return [f"--out: expected a folder, found the file {out}"]
    if _holds_something(out) and not (out / MANIFEST).is_file():
        return [f"--out: expected a new folder or a converted dataset, found other files in {out}"]
    return []


def in_the_way(out: Path, force: bool) -> list[str]:
    """Why a dataset is not replaced, if so. A folder that is not ours is never deleted."""
    if not _holds_something(out):
        return []
    if not force:
        return [f"--out: {out} holds a different dataset; give --force to replace it"]
    return [
        f"--out: expected nothing but a converted dataset in {out}, found the folder {path.name}"
        for path in sorted(out.iterdir())
        if path.is_dir() and path.name not in FOLDERS
    ]


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def raise_any(problems: Iterable[str]) -> None:
    """Raise `UserError` if there are any problems."""
    if lines := list(problems):
        raise UserError(*lines)


def work_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the file system of the output."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=".dataset-")
    except OSError as error:
        raise UserError(f"--out: expected a folder that can be written, found {error}") from None


def place_image(
    image: Path, path: Path, link: Literal["hardlink", "symlink", "copy"], *, convert: bool
) -> None:
    """Put an image into a dataset. A hard link that cannot be made becomes a copy.

    With `convert` it is written anew, as an 8-bit PNG.
    """
    if convert:
        cv2.imencode(".png", read_image(image))[1].tofile(path)
        return
    original = image.resolve()
    if link == "symlink":
        path.symlink_to(original)
        return
    if link == "hardlink":
        try:
            path.hardlink_to(original)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(original, path)


def write_annotations(
    folder: Path,
    root: Path,
    items: Sequence[Item],
    classes: Sequence[str],
    split: Split,
    folds: Sequence[Split],
) -> None:
    """Write truth and splits; the images are put there by `place_image`.

    `root` is where the dataset will lie. Image ids are from 1, in the order of `items`.
    """
    coco = write_truth(folder, items, classes)
    write_split(folder, coco, split, root)
    for fold, fold_split in enumerate(folds):
        write_split(folder, coco, fold_split, root, fold)


def count(
    items: Iterable[Item], class_of: Mapping[str, str], classes: Sequence[str], split: Split
) -> Counts:
    """Images of each class, `class_of` each file name, and instances of each class, by split."""
    by_name = {item.file_name: item for item in items}
    counts: Counts = {}
    for part, names in split.items():
        images = Counter(class_of[name] for name in names)
        instances = Counter(i.cls for name in names for i in by_name[name].instances)
        counts[part] = {
            cls: {"images": images[cls], "instances": instances[cls]} for cls in (GOOD, *classes)
        }
    return counts


def table_of(title: str, counts: Counts) -> Table:
    """Images and instances per class and split."""
    table = Table(title=f"{title}: images (instances)")
    table.add_column("class")
    for part in (*counts, "all"):
        table.add_column(part, justify="right")

    def cell(cells: list[dict[str, int]]) -> str:
        images, instances = (sum(c[key] for c in cells) for key in ("images", "instances"))
        return f"{images} ({instances})" if instances else str(images)

    parts = list(counts.values())
    for cls in parts[0]:
        row = [part[cls] for part in parts]
        table.add_row(cls, *(cell([c]) for c in row), cell(row))
    table.add_section()
    columns = [list(part.values()) for part in parts]
    table.add_row("all", *map(cell, columns), cell([c for column in columns for c in column]))
    return table


def same(out: Path, built: Path) -> bool:
    """Whether both folders hold the same dataset; caches that other tools left do not count."""
    new = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    suffixes = {path.suffix for path in new}
    old = {
        path.relative_to(out)
        for folder in (out, *(out / name for name in FOLDERS))
        for path in folder.glob("*")
        if path.suffix in suffixes and path.name not in RECORD
    }
    return old == new and all(
        (out / path).is_file() and filecmp.cmp(out / path, built / path, shallow=False)
        for path in new
    )


def install(built: Path, command: str, config: StageConfig, *, unchanged: bool) -> None:
    """Move a finished dataset to `config.out`, with the record of how it was made."""
    if not unchanged:
        record.write_record(built, command, config)
        with atomic_folder(config.out) as place:
            built.replace(place)
    elif not record.is_complete(config.out, record.signature(command, config)):
        record.write_record(config.out, command, config)
