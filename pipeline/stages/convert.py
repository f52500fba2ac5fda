"""`pipeline convert`: an MVTec category becomes a dataset of YOLO boxes and COCO masks.

Every file is read and checked before anything is written. MVTec repeats `000.png` in every folder,
so names in the dataset are `<class>__<name>` for defects, and `good__train_<name>` or
`good__test_<name>` for good images.
"""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline import record
from pipeline.config import ConvertConfig
from pipeline.data import masks, mvtec, splits
from pipeline.data.coco import Instance, Item, write_split, write_truth
from pipeline.data.dataset import GOOD
from pipeline.data.files import atomic_folder, read_image, sha256, write_json
from pipeline.errors import UserError

FOLDERS = ("images", "labels", "annotations")
Counts = dict[str, dict[str, dict[str, int]]]  # split -> class -> images and instances


@dataclass(frozen=True)
class Source:
    """One image that goes into the dataset."""

    entry: mvtec.Entry
    item: Item
    convert: str | None  # why it is written anew instead of linked
    merged: int  # components of the mask that are no instance of their own
    sha256: str
    mask_sha256: str | None


@dataclass(frozen=True)
class Category:
    """One category, read."""

    config: ConvertConfig  # with this category as source, and its own output folder
    sources: list[Source]
    classes: list[str]
    problems: list[mvtec.Finding]
    skipped: list[mvtec.Finding]  # the problems, and all else that was left out


def run(config: ConvertConfig) -> None:
    """Convert a category, or every category below `config.source` into `config.out/<category>`.

    Raises `UserError` for bad input, all problems together, and for an output that would change
    without `config.force`. An output that would not change is left as it is.
    """
    # A broken image is reported by us; OpenCV's own lines about it name no file.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    found = mvtec.categories(config.source)
    single = found == [config.source]
    _check_apart(config)
    out = config.out.resolve()
    places = [out] if single else [out / source.name for source in found]
    _raise(problem for place in places for problem in _not_ours(place))
    categories = [
        _read(config.model_copy(update={"source": source, "out": place}))
        for source, place in zip(found, places, strict=True)
    ]
    _check(config, categories)

    with _work_folder(out.parent if single else out) as work:
        built = [Path(work) / str(i) for i in range(len(categories))]
        tables = [_write(*pair) for pair in zip(categories, built, strict=True)]
        same = [_same(*pair) for pair in zip(places, built, strict=True)]
        changed = [place for place, equal in zip(places, same, strict=True) if not equal]
        _raise(problem for place in changed for problem in _in_the_way(place, config.force))
        for category, folder, unchanged in zip(categories, built, same, strict=True):
            _install(category.config, folder, unchanged)

    for category, table, unchanged in zip(categories, tables, same, strict=True):
        _report(category, table, unchanged)


def _check_apart(config: ConvertConfig) -> None:
    source, out = config.source.resolve(), config.out.resolve()
    if source.is_relative_to(out) or out.is_relative_to(source):
        raise UserError(f"--out: expected a folder apart from --source, found {out}")


def _not_ours(out: Path) -> list[str]:
    """Why a folder cannot be an output, if so."""
    if out.exists() and not out.is_dir():
        return [f"--out: expected a folder, found the file {out}"]
    if _holds_something(out) and not (out / "manifest.json").is_file():
        return [f"--out: expected a new folder or a converted dataset, found other files in {out}"]
    return []


def _in_the_way(out: Path, force: bool) -> list[str]:
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


def _raise(problems: Iterable[str]) -> None:
    """Raise `UserError` if there are any problems."""
    if lines := list(problems):
        raise UserError(*lines)


def _read(config: ConvertConfig) -> Category:
    """Pair, decode, hash and check every file of a category."""
    scan = mvtec.scan(config.source)
    problems, skipped, sources = list(scan.problems), list(scan.ignored), []
    title, console = f"reading {config.source.name}", Console(stderr=True)
    for entry in track(scan.entries, title, console=console, transient=True):
        try:
            sources.append(_source(entry, config))
        except mvtec.BadFiles as bad:
            problems += bad.problems
            named = {problem.path for problem in bad.problems}
            skipped += [
                mvtec.Finding(path, "its counterpart cannot be used")
                for path in (entry.image, entry.mask)
                if path and path not in named
            ]
    classes = sorted({source.entry.cls for source in sources} - {GOOD})
    skipped = sorted(problems + skipped, key=lambda finding: finding.path)
    return Category(config, sources, classes, problems, skipped)


def _source(entry: mvtec.Entry, config: ConvertConfig) -> Source:
    """Read one image and split its mask into instances. Raises `mvtec.BadFiles`."""
    picture = mvtec.read(entry)
    instances, merged = [], 0
    if picture.mask is not None:
        parts, merged = masks.components(picture.mask, config.min_area)
        if entry.cls in config.one_per_image:
            parts, merged = [picture.mask], merged + len(parts) - 1
        for part in parts:
            area = int(np.count_nonzero(part))
            instances.append(Instance(entry.cls, masks.box_of(part), area, masks.encode_rle(part)))
    suffix = ".png" if picture.convert else entry.image.suffix
    return Source(
        entry=entry,
        item=Item(entry.name + suffix, picture.width, picture.height, tuple(instances)),
        convert=picture.convert,
        merged=merged,
        sha256=sha256(entry.image),
        mask_sha256=None if entry.mask is None else sha256(entry.mask),
    )


def _check(config: ConvertConfig, categories: list[Category]) -> None:
    """Raise `UserError` for what makes a conversion impossible or, unless allowed, incomplete."""
    if not config.skip_bad:
        _raise(str(problem) for category in categories for problem in category.problems)
    problems = [
        f"{category.config.source}: expected a defect class with usable images, found none"
        for category in categories
        if not category.classes
    ]
    known = {name for category in categories for name in category.classes}
    standard = ConvertConfig.model_fields["one_per_image"].default  # need not be everywhere
    problems += [
        f"--one-per-image: expected some of {', '.join(sorted(known))}, found '{name}'"
        for name in config.one_per_image
        if name not in known and name not in standard
    ]
    for category in categories:
        groups = _groups(category)
        largest = max(groups, key=lambda cls: len(groups[cls]))
        if config.folds > len(groups[largest]):  # then some fold could have nothing to test
            problems.append(
                f"--folds: expected at most {len(groups[largest])}, the images of {largest} in "
                f"{category.config.source}, found {config.folds}"
            )
    _raise(problems)


def _groups(category: Category) -> dict[str, list[str]]:
    """The file names of each class, good images first."""
    groups: dict[str, list[str]] = {cls: [] for cls in (GOOD, *category.classes)}
    for source in category.sources:
        groups[source.entry.cls].append(source.item.file_name)
    return groups


def _work_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the file system of the output."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=".convert-")
    except OSError as error:
        raise UserError(f"--out: expected a folder that can be written, found {error}") from None


def _write(category: Category, folder: Path) -> Table:
    """Write a whole dataset into a new folder; returns its counts as a table."""
    config, sources = category.config, category.sources
    (folder / "images").mkdir(parents=True)
    for source in sources:
        _place(source, folder / "images" / source.item.file_name, config.link)
    coco = write_truth(folder, [source.item for source in sources], category.classes)

    groups = _groups(category)
    if config.split == "study":
        split = splits.study(groups, config.fractions[1], config.seed)
    else:
        split = splits.by_fractions(groups, config.fractions, config.seed)
    write_split(folder, coco, split, config.out)
    if config.folds:
        folds = splits.by_folds(groups, config.folds, config.fractions[1], config.seed)
        for fold, fold_split in enumerate(folds):
            write_split(folder, coco, fold_split, config.out, fold)

    counts = _counts(category, split)
    write_json(folder / "manifest.json", _manifest(category, split, counts))
    return _table(config.source.resolve().name, counts)


def _place(source: Source, path: Path, link: Literal["hardlink", "symlink", "copy"]) -> None:
    """Put an image into the dataset. A hard link that cannot be made becomes a copy."""
    if source.convert:
        cv2.imencode(".png", read_image(source.entry.image))[1].tofile(path)
        return
    original = source.entry.image.resolve()
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


def _counts(category: Category, split: splits.Split) -> Counts:
    instances = {s.item.file_name: len(s.item.instances) for s in category.sources}
    counts: Counts = {}
    for part, names in split.items():
        counts[part] = {}
        for cls, members in _groups(category).items():
            here = set(names).intersection(members)
            counts[part][cls] = {
                "images": len(here),
                "instances": sum(instances[name] for name in here),
            }
    return counts


def _manifest(category: Category, split: splits.Split, counts: Counts) -> dict[str, Any]:
    """Where everything came from and what became of it. Paths are relative to the category."""
    config = category.config
    part_of = {name: part for part, names in split.items() for name in names}

    def relative(path: Path) -> str:
        return path.relative_to(config.source).as_posix()

    images, merged = [], []
    for source in category.sources:
        image: dict[str, Any] = {
            "file": f"images/{source.item.file_name}",
            "class": source.entry.cls,
            "split": part_of[source.item.file_name],
            "source": relative(source.entry.image),
            "sha256": source.sha256,
        }
        if source.entry.mask:
            image["mask"] = relative(source.entry.mask)
            image["mask_sha256"] = source.mask_sha256
            image["instances"] = len(source.item.instances)
        if source.convert:
            image["converted"] = f"to 8-bit PNG: {source.convert}"
        images.append(image)
        if source.merged:
            reason = f"under {config.min_area} pixels, merged into the nearest"
            if source.entry.cls in config.one_per_image:
                reason = "one instance per image of this class"
            entry = {"mask": image["mask"], "components": source.merged, "reason": reason}
            merged.append(entry)
    return {
        "category": config.source.resolve().name,
        "classes": category.classes,
        "counts": counts,
        "images": images,
        "merged": merged,
        "skipped": [{"file": relative(f.path), "reason": f.text} for f in category.skipped],
    }


def _same(out: Path, built: Path) -> bool:
    """Whether both folders hold the same dataset; caches that other tools left do not count."""
    new = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    suffixes = {path.suffix for path in new}
    old = {
        path.relative_to(out)
        for folder in (out, *(out / name for name in FOLDERS))
        for path in folder.glob("*")
        if path.suffix in suffixes and path.name not in ("config.yaml", "run.json")
    }
    return old == new and all(
        (out / path).is_file() and filecmp.cmp(out / path, built / path, shallow=False)
        for path in new
    )


def _install(config: ConvertConfig, built: Path, unchanged: bool) -> None:
    """Move a finished dataset to its place, with the record of how it was made."""
    config = config.model_copy(update={"source": config.source.resolve()})
    if not unchanged:
        record.write_record(built, "convert", config)
        with atomic_folder(config.out) as place:
            built.replace(place)
    elif not record.is_complete(config.out, record.signature("convert", config)):
        record.write_record(config.out, "convert", config)


def _table(title: str, counts: Counts) -> Table:
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


def _report(category: Category, table: Table, unchanged: bool) -> None:
    console = Console()
    console.print(table)
    merged = sum(source.merged for source in category.sources)
    converted = sum(source.convert is not None for source in category.sources)
    for count, what in (
        (len(category.problems), "problems: bad files left out"),
        (merged, "components of masks merged"),
        (converted, "images converted to 8-bit PNG"),
    ):
        if count:
            print(f"{count} {what}, listed in manifest.json")
    print(f"{category.config.out}{' (unchanged)' if unchanged else ''}")
