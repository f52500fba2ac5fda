"""`pipeline convert`: an MVTec category becomes a dataset of YOLO boxes and COCO masks.

Every file is read and checked before anything is written. MVTec repeats `000.png` in every folder,
so names in the dataset are `<class>__<name>` for defects, and `good__train_<name>` or
`good__test_<name>` for good images.

An unseen class is split like any other, and then taken out of what models and thresholds are chosen
by: its images leave train and val for test or, in folds, for nowhere, so that each is still tested
by exactly one fold. The splits of all other classes are the same as without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.config import ConvertConfig
from pipeline.data import dataset_folder, masks, mvtec, splits
from pipeline.data.coco import Item, instance_of
from pipeline.data.dataset import GOOD
from pipeline.data.dataset_folder import MANIFEST, Counts, check_apart, raise_any
from pipeline.data.files import read_json, sha256, write_json


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
    check_apart(config.out, {"--source": config.source})
    out = config.out.resolve()
    places = [out] if single else [out / source.name for source in found]
    raise_any(problem for place in places for problem in dataset_folder.not_ours(place))
    categories = [
        _read(config.model_copy(update={"source": source, "out": place}))
        for source, place in zip(found, places, strict=True)
    ]
    _check(config, categories)

    with dataset_folder.work_folder(out.parent if single else out) as work:
        built = [Path(work) / str(i) for i in range(len(categories))]
        tables = [_write(*pair) for pair in zip(categories, built, strict=True)]
        same = [dataset_folder.same(*pair) for pair in zip(places, built, strict=True)]
        changed = [place for place, equal in zip(places, same, strict=True) if not equal]
        raise_any(
            problem
            for place in changed
            for problem in _reviewed(place) or dataset_folder.in_the_way(place, config.force)
        )
        for category, folder, unchanged in zip(categories, built, same, strict=True):
            resolved = category.config.model_copy(
                update={"source": category.config.source.resolve()}
            )
            dataset_folder.install(folder, "convert", resolved, unchanged=unchanged)

    for category, table, unchanged in zip(categories, tables, same, strict=True):
        _report(category, table, unchanged)


def _reviewed(out: Path) -> list[str]:
    """Why a dataset is not replaced even if forced, if so: `pipeline run` forces, too."""
    path = out / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    if not isinstance(manifest, dict):
        return []
    return [
        f"--out: expected a dataset without a person's work in it, found {work} in {path}"
        for work in ("reviews", "imports")
        if work in manifest
    ]


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
        instances = [instance_of(entry.cls, part) for part in parts]
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
        raise_any(str(problem) for category in categories for problem in category.problems)
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
    problems += [
        f"--unseen: expected some of {', '.join(sorted(known))}, found '{name}'"
        for name in config.unseen
        if name not in known
    ]
    for category in categories:
        if category.classes and not set(category.classes) - set(config.unseen):
            problems.append(
                f"--unseen: expected a class of {category.config.source} that can be learned, "
                f"found all in it: {', '.join(category.classes)}"
            )
        groups = _groups(category)
        largest = max(groups, key=lambda cls: len(groups[cls]))
        if config.folds > len(groups[largest]):  # then some fold could have nothing to test
            problems.append(
                f"--folds: expected at most {len(groups[largest])}, the images of {largest} in "
                f"{category.config.source}, found {config.folds}"
            )
    raise_any(problems)


def _groups(category: Category) -> dict[str, list[str]]:
    """The file names of each class, good images first."""
    groups: dict[str, list[str]] = {cls: [] for cls in (GOOD, *category.classes)}
    for source in category.sources:
        groups[source.entry.cls].append(source.item.file_name)
    return groups


def _write(category: Category, folder: Path) -> Table:
    """Write a whole dataset into a new folder; returns its counts as a table."""
    config, sources = category.config, category.sources
    (folder / "images").mkdir(parents=True)
    for source in sources:
        dataset_folder.place_image(
            source.entry.image,
            folder / "images" / source.item.file_name,
            config.link,
            convert=source.convert is not None,
        )
    groups = _groups(category)
    if config.split == "study":
        split = splits.study(groups, config.fractions[1], config.seed)
    else:
        split = splits.by_fractions(groups, config.fractions, config.seed)
    folds = (
        splits.by_folds(groups, config.folds, config.fractions[1], config.seed)
        if config.folds
        else []
    )
    unseen = {name for cls in config.unseen for name in groups.get(cls, ())}
    split = splits.only_tested(split, unseen)
    split["test"] = sorted({*split["test"], *unseen})
    folds = [splits.only_tested(fold, unseen) for fold in folds]
    items = [source.item for source in sources]
    dataset_folder.write_annotations(folder, config.out, items, category.classes, split, folds)
    class_of = {source.item.file_name: source.entry.cls for source in sources}
    counts = dataset_folder.count(items, class_of, category.classes, split)
    write_json(folder / MANIFEST, _manifest(category, split, counts))
    return dataset_folder.table_of(config.source.resolve().name, counts)


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
