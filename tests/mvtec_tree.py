"""A small MVTec category with all that is awkward in it, and its truth worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

Rectangle = tuple[int, int, int, int]  # half-open: x1, y1, x2, y2


@dataclass(frozen=True)
class Defect:
    """A defective image to be drawn, and what is expected to come of it."""

    cls: str
    image: str  # file name
    mask: str
    width: int
    height: int
    marked: tuple[Rectangle, ...]  # together they are the mask
    holes: tuple[Rectangle, ...] = ()
    value: int = 255  # of a marked pixel
    image_depth: type = np.uint8
    image_channels: int = 3
    mask_depth: type = np.uint8
    mask_channel: int | None = None  # mark only this channel of a colour mask
    mask_alpha: bool = False  # an opaque fourth channel
    boxes: tuple[Rectangle, ...] = ()  # expected instances, in reading order
    areas: tuple[int, ...] = ()
    merged: int = 0

    @property
    def stem(self) -> str:
        return f"{self.cls}__{Path(self.image).stem}"

    @property
    def truth(self) -> np.ndarray:
        """(height, width) bool."""
        truth = np.zeros((self.height, self.width), bool)
        for value, rectangles in ((True, self.marked), (False, self.holes)):
            for x1, y1, x2, y2 in rectangles:
                truth[y1:y2, x1:x2] = value
        return truth


DEFECTS = (
    # two components, one of them touching two borders
    Defect("crack", "000.png", "000_mask.png", 64, 40, ((0, 0, 5, 4), (30, 20, 40, 25)),
           boxes=((0, 0, 5, 4), (30, 20, 40, 25)), areas=(20, 50)),
    # a ring: its hole is no defect; mask pixels are 1, not 255
    Defect("crack", "001.jpg", "001_mask.png", 40, 64, ((10, 10, 20, 22),),
           holes=((13, 14, 16, 18),), value=1, image_channels=1,
           boxes=((10, 10, 20, 22),), areas=(108,)),
    # one pixel in the last corner, alone though under the least area
    Defect("crack", "002.bmp", "002_mask.bmp", 33, 21, ((32, 20, 33, 21),),
           boxes=((32, 20, 33, 21),), areas=(1,)),
    # two squares that touch at a corner are one; only the red channel of the mask says so
    Defect("crack", "003.tif", "003_mask.tiff", 50, 50, ((5, 5, 10, 10), (10, 10, 15, 15)),
           mask_channel=2, boxes=((5, 5, 15, 15),), areas=(50,)),
    # a speck of 3 pixels joins the nearer of two blobs; 16-bit image and mask, whose high byte is 0
    Defect("crack", "004.png", "004_mask.png", 48, 48,
           ((2, 2, 8, 8), (12, 3, 15, 4), (40, 40, 46, 46)),
           value=3, image_depth=np.uint16, mask_depth=np.uint16,
           boxes=((2, 2, 15, 8), (40, 40, 46, 46)), areas=(39, 36), merged=1),
    Defect("crack", "005.tiff", "005_mask.png", 30, 31, ((4, 4, 9, 9),),
           image_depth=np.uint16, image_channels=1, boxes=((4, 4, 9, 9),), areas=(25,)),
    # one instance per image; names that also occur in the other class
    Defect("misplaced", "000.png", "000_mask.bmp", 64, 48, ((1, 1, 11, 11), (30, 30, 40, 40)),
           boxes=((1, 1, 40, 40),), areas=(200,), merged=1),
    # a mask named like its image, with alpha
    Defect("misplaced", "001.png", "001.png", 20, 20, ((0, 0, 20, 20),), image_channels=4,
           mask_alpha=True, boxes=((0, 0, 20, 20),), areas=(400,)),
    # a JPEG mask: its edges ring, and only what is nearer to white counts
    Defect("misplaced", "002.JPEG", "002_mask.jpg", 64, 64, ((17, 18, 41, 33),),
           boxes=((17, 18, 41, 33),), areas=(360,)),
)  # fmt: skip
GOOD = (
    *(f"train/good/{name}" for name in ("000.png", "001.jpg", "002.bmp", "003.tif", "004.png")),
    *(f"test/good/{name}" for name in ("000.png", "001.png", "002.png")),
)


def write_tree(root: Path) -> Path:
    """Draw the whole category into `root`, and return it."""
    rng = np.random.default_rng(0)
    for defect in DEFECTS:
        shape = (defect.height, defect.width, defect.image_channels)
        write(root / "test" / defect.cls / defect.image, _texture(rng, shape, defect.image_depth))
        write(root / "ground_truth" / defect.cls / defect.mask, _mask(defect))
    for index, name in enumerate(GOOD):
        write(root / name, _texture(rng, (24 + index, 32, 3), np.uint8))
    (root / "license.txt").write_text("ours", encoding="utf-8")
    (root / "test" / "good" / "notes.md").write_text("a note", encoding="utf-8")
    (root / "test" / "good" / ".DS_Store").write_bytes(b"hidden")
    return root


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, data = cv2.imencode(path.suffix.lower(), image)
    assert ok
    path.write_bytes(data.tobytes())


def _texture(rng: np.random.Generator, shape: tuple[int, ...], depth: type) -> np.ndarray:
    return rng.integers(0, np.iinfo(depth).max, shape, depth, endpoint=True)


def _mask(defect: Defect) -> np.ndarray:
    grey = defect.truth.astype(defect.mask_depth) * defect.mask_depth(defect.value)
    if defect.mask_channel is not None:
        colour = np.zeros((*grey.shape, 3), grey.dtype)
        colour[..., defect.mask_channel] = grey
        return colour
    if defect.mask_alpha:
        return np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return grey
