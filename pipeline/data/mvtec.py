"""A category in MVTec AD layout: what belongs together, and what is wrong with it.

    train/good/000.png    test/good/000.png    test/<defect>/000.png
    ground_truth/<defect>/000_mask.png         (any pixel above 0 is defect)

An image and its mask are paired by name, never by position. Layout: Bergmann et al., "MVTec AD",
CVPR 2019.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.dataset import GOOD
from pipeline.data.files import decode, list_images
from pipeline.errors import UserError

PARTS = ("train", "test", "ground_truth")
MIN_SIDE = 10  # Ultralytics leaves smaller images out
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, BMP_START = b"\x89PNG", b"BM"


@dataclass(frozen=True)
class Finding:
    """What was expected of a file or folder, and what was found. A folder stands for its files."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


class BadFiles(Exception):
    """An image or its mask that cannot be used."""

    def __init__(self, problems: list[Finding]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True)
class Entry:
    """An image, and its mask if it shows a defect."""

    image: Path
    mask: Path | None
    cls: str
    name: str  # unique in the category, without suffix


@dataclass
class Scan:
    """What a category holds."""

    entries: list[Entry] = field(default_factory=list)  # sorted by name
    problems: list[Finding] = field(default_factory=list)
    ignored: list[Finding] = field(default_factory=list)  # what no one would take for a sample


@dataclass(frozen=True)
class Picture:
    """What is known of an image once it has been decoded."""

    width: int
    height: int
    mask: np.ndarray | None  # (height, width) bool
    convert: str | None  # why the file cannot be used as it is, if so


def categories(source: Path) -> list[Path]:
    """The category folders: `source` itself, or its subfolders of that layout.

    Raises `UserError` when there are none.
    """
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing there"
        raise UserError(f"--source: expected a folder in MVTec layout, found {found}: {source}")
    if _is_category(source):
        return [source]
    below = _folders(source)
    if not any(map(_is_category, below)):
        raise UserError(
            f"--source: expected {', '.join(PARTS)} in {source} or in its subfolders, "
            f"found {', '.join(folder.name for folder in below) or 'no folders'}"
        )
    return [folder for folder in below if _is_category(folder)]


def scan(root: Path) -> Scan:
    """Pair the images and masks of a category, without opening them."""
    result = Scan()
    defects = {f.name for part in ("test", "ground_truth") for f in _folders(root / part)} - {GOOD}
    if not defects:
        text = "expected a defect folder in test/ and ground_truth/, found none"
        result.problems.append(Finding(root, text))
    _check_folders(root, result)
    for part in ("train", "test"):
        _add_good(root / part / GOOD, part, result)
    for cls in sorted(defects):
        _add_defects(root, cls, result)
    result.entries.sort(key=lambda entry: entry.name)
    _check_names(result)
    return result


def read(entry: Entry) -> Picture:
    """Decode an image and its mask. Raises `BadFiles` naming each that is wrong."""
    problems: list[Finding] = []
    image = _decoded(entry.image, problems)
    if image is not None and min(image.shape[:2]) < MIN_SIDE:
        text = f"expected at least {MIN_SIDE} x {MIN_SIDE} pixels, found {_size(image)}"
        problems.append(Finding(entry.image, text))
    mask = None
    if entry.mask is not None and (pixels := _decoded(entry.mask, problems)) is not None:
        # JPEG cannot keep zeros beside an edge, so there a defect is what is nearer to white.
        above = 127 if _ends(entry.mask)[0].startswith(JPEG_START) else 0
        mask = np.asarray((pixels > above).any(axis=2))
        if not mask.any():
            problems.append(Finding(entry.mask, "expected a mask with pixels, found an empty one"))
        if image is not None and mask.shape != image.shape[:2]:
            text = f"expected the size of its image, {_size(image)}, found {_size(mask)}"
            problems.append(Finding(entry.mask, text))
    if problems or image is None:
        raise BadFiles(problems)
    height, width = image.shape[:2]
    return Picture(width, height, mask, _why_convert(entry.image, image))


def _decoded(path: Path, problems: list[Finding]) -> np.ndarray | None:
    """(height, width, 3), alpha left out: in a mask it says nothing of the defect."""
    try:
        return decode(path, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    except UserError as error:
        problems.append(Finding(path, str(error).removeprefix(f"{path}: ")))
        return None


def _why_convert(path: Path, image: np.ndarray) -> str | None:
    """Why other tools would read the file differently or change it, if so."""
    if image.dtype != np.uint8:
        return "16-bit, of which the upper byte is kept"
    start, end = _ends(path)
    if not start.startswith((PNG_START, BMP_START, JPEG_START)):
        return "a format that tools read with differing channels, such as TIFF"
    if start.startswith(JPEG_START) and end != JPEG_END:
        return "JPEG without end marker"  # Ultralytics would write it anew, through a link too
    return None


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first four and the last two bytes of a file that has been decoded."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(-2, 2)
        return start, file.read()


def _add_good(folder: Path, part: str, result: Scan) -> None:
    for stem, paths in _images(folder, result).items():
        if len(paths) == 1:
            result.entries.append(Entry(paths[0], None, GOOD, f"{GOOD}__{part}_{stem}"))
        else:
            found = " and ".join(path.name for path in paths)
            result.problems += [
                Finding(path, f"expected one image named {stem}, found {found}") for path in paths
            ]


def _add_defects(root: Path, cls: str, result: Scan) -> None:
    """Pair the images of one defect class with their masks."""
    image_folder, mask_folder = root / "test" / cls, root / "ground_truth" / cls
    for folder, missing in ((image_folder, mask_folder), (mask_folder, image_folder)):
        if not missing.is_dir():
            text = f"expected its counterpart {missing}, found no such folder"
            result.problems.append(Finding(folder, text))
            return
    images = _images(image_folder, result)
    masks: dict[str, list[Path]] = defaultdict(list)
    for stem, paths in _images(mask_folder, result).items():
        bare = stem.removesuffix("_mask")
        masks[stem if stem in images and bare not in images else bare] += paths
    if not images and not masks:
        result.problems.append(Finding(image_folder, "expected images, found none"))
    for stem in sorted(images.keys() | masks.keys()):
        its_images, its_masks = images.get(stem, []), masks.get(stem, [])
        if len(its_images) > 1 or len(its_masks) > 1:
            both = its_images + its_masks
            found = ", ".join(f"{path.parent.parent.name}/{cls}/{path.name}" for path in both)
            text = f"expected one image and one mask named {stem}, found {found}"
            result.problems += [Finding(path, text) for path in both]
        elif not its_masks:
            wanted = mask_folder / f"{stem}_mask.png"
            result.problems.append(
                Finding(its_images[0], f"expected its mask {wanted}, found none")
            )
        elif not its_images:
            wanted = image_folder / f"{stem}.png"
            result.problems.append(
                Finding(its_masks[0], f"expected its image {wanted}, found none")
            )
        else:
            result.entries.append(Entry(its_images[0], its_masks[0], cls, f"{cls}__{stem}"))


def _check_folders(root: Path, result: Scan) -> None:
    """Note the files and folders beside those of the layout."""
    for folder in _folders(root / "train"):
        if folder.name != GOOD:
            result.problems.append(Finding(folder, f"expected only {GOOD}/ in train/, found this"))
    if (root / "ground_truth" / GOOD).is_dir():
        text = "expected masks of defects alone, found a folder for good images"
        result.problems.append(Finding(root / "ground_truth" / GOOD, text))
    strays = [folder for folder in _folders(root) if folder.name not in PARTS]
    for folder in (root, *(root / part for part in PARTS)):
        strays += _files(folder)
    result.ignored += [Finding(path, "not part of the layout") for path in strays]


def _images(folder: Path, result: Scan) -> dict[str, list[Path]]:
    """The image files of a folder by stem; notes what else is there."""
    if not folder.is_dir():
        return {}
    by_stem: dict[str, list[Path]] = defaultdict(list)
    images = [path for path in list_images(folder) if not path.is_dir()]
    for path in images:
        by_stem[path.stem].append(path)
    result.problems += [
        Finding(below, "expected image files alone, found a folder") for below in _folders(folder)
    ]
    result.ignored += [
        Finding(path, "not an image by its suffix") for path in _files(folder) if path not in images
    ]
    return by_stem


def _check_names(result: Scan) -> None:
    """Drop entries whose name cannot stand in a list, or is taken.

    The latter is possible only where a class name holds or ends in underscores.
    """
    kept: dict[str, Entry] = {}
    for entry in result.entries:
        if len(entry.name.splitlines()) > 1 or not _is_unicode(entry.name):
            text = "expected a name that is one line of text, found other characters in it"
            result.problems.append(Finding(entry.image, text))
        elif entry.name in kept:
            other = kept[entry.name].image
            text = f"expected a name of its own, found that {other} becomes {entry.name} too"
            result.problems.append(Finding(entry.image, text))
        else:
            kept[entry.name] = entry
    result.entries = list(kept.values())


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_category(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in PARTS)


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if not path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"
