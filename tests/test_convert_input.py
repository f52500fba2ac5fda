"""`pipeline convert`: all kinds of bad input, and requests that cannot be met."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from converted import contents, convert, instances, read
from mvtec_tree import DEFECTS, GOOD, write, write_tree

from pipeline.data.dataset import Dataset


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A source of its own, to be spoilt."""
    return write_tree(tmp_path / "widget")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda root: (
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    )


def _write(name: str, image: np.ndarray) -> Callable[[Path], None]:
    return lambda root: write(root / name, image)


def _truncate(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:60])


def _make(name: str, data: bytes = b"") -> Callable[[Path], None]:
    def action(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return action


def _empty_class(root: Path) -> None:
    (root / "test" / "void").mkdir()
    (root / "ground_truth" / "void").mkdir()


class Bad(NamedTuple):
    """A way to spoil the tree, and what is expected then."""

    spoil: Callable[[Path], object]
    paths: list[str]  # that are named
    text: str  # that is said of each
    lost: int  # images left out by --skip-bad


GREY = np.full((20, 20), 255, np.uint8)
IMAGE, MASK = "test/crack/000.png", "ground_truth/crack/000_mask.png"  # 64 x 40
BLANK = np.zeros((40, 64), np.uint8)
UNREADABLE = "cannot be decoded"
PAIR = "one image and one mask"

BAD = {
    "missing mask": Bad(_remove(MASK), [IMAGE], f"expected its mask {{root}}/{MASK}", 1),
    "no image": Bad(_remove(IMAGE), [MASK], f"expected its image {{root}}/{IMAGE}", 1),
    "empty mask": Bad(_write(MASK, BLANK), [MASK], "empty", 1),
    "opaque empty mask": Bad(
        _write(MASK, np.dstack([BLANK, BLANK, BLANK, BLANK + 255])), [MASK], "empty", 1
    ),
    "size mismatch": Bad(_write(MASK, BLANK.T + 255), [MASK], "64 x 40, found 40 x 64", 1),
    "truncated mask": Bad(_truncate(MASK), [MASK], UNREADABLE, 1),
    "truncated image": Bad(_truncate(IMAGE), [IMAGE], UNREADABLE, 1),
    "truncated JPEG": Bad(_truncate("train/good/001.jpg"), ["train/good/001.jpg"], UNREADABLE, 1),
    "empty file": Bad(_make("train/good/000.png"), ["train/good/000.png"], UNREADABLE, 1),
    "text": Bad(_make("test/good/000.png", b"hello"), ["test/good/000.png"], UNREADABLE, 1),
    "dangling link": Bad(
        lambda root: (root / "test/good/009.png").symlink_to("nowhere"),
        ["test/good/009.png"],
        "expected an image, found nothing there",
        0,
    ),
    "float image": Bad(
        _write("train/good/003.tif", np.ones((20, 20, 3), np.float32)),
        ["train/good/003.tif"],
        "expected an 8- or 16-bit image, found float32",
        1,
    ),
    "tiny image": Bad(
        _write("train/good/000.png", GREY[:9]), ["train/good/000.png"], "at least 10 x 10", 1
    ),
    "two good images of a name": Bad(
        _write("train/good/000.jpg", GREY),
        ["train/good/000.jpg", "train/good/000.png"],
        "expected one image named 000",
        1,
    ),
    "two images of a name": Bad(
        _write("test/crack/000.bmp", GREY), ["test/crack/000.bmp", IMAGE, MASK], PAIR, 1
    ),
    "two masks of a name": Bad(
        _write("ground_truth/crack/000.png", GREY),
        [IMAGE, "ground_truth/crack/000.png", MASK],
        PAIR,
        1,
    ),
    "no mask folder": Bad(
        _remove("ground_truth/misplaced"), ["test/misplaced"], "no such folder", 3
    ),
    "no image folder": Bad(
        _remove("test/misplaced"), ["ground_truth/misplaced"], "no such folder", 3
    ),
    "empty class": Bad(_empty_class, ["test/void"], "expected images, found none", 0),
    "defects in train": Bad(
        _write("train/crack/000.png", GREY), ["train/crack"], "expected only good/", 0
    ),
    "masks of good images": Bad(
        _write("ground_truth/good/000_mask.png", GREY), ["ground_truth/good"], "good images", 0
    ),
    "a folder among images": Bad(
        _write("test/crack/more/000.png", GREY), ["test/crack/more"], "found a folder", 0
    ),
    "a name of two lines": Bad(
        _write("train/good/0\n1.png", GREY), ["train/good/0\n1.png"], "one line", 0
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_and_stops_or_is_skipped(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: Bad
) -> None:
    case.spoil(copy)
    text = case.text.format(root=copy)
    out = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as stop:
        convert(copy, out)
    assert stop.value.code == 2
    problems = capsys.readouterr().err.split("pipeline convert: ")[1:]
    assert sorted(problem.split(": expected")[0] for problem in problems) == sorted(
        str(copy / path) for path in case.paths
    )
    assert all(text in problem for problem in problems)
    assert not out.parent.exists()

    convert(copy, out, "--skip-bad")
    manifest = read(out / "manifest.json")
    skipped = {entry["file"]: entry["reason"] for entry in manifest["skipped"]}
    assert all(text in skipped[path] for path in case.paths)
    assert len(manifest["images"]) == len(DEFECTS) + len(GOOD) - case.lost
    assert len(list((out / "images").iterdir())) == len(manifest["images"])
    used = {image.get(key) for image in manifest["images"] for key in ("source", "mask")}
    files = {
        p.relative_to(copy).as_posix() for p in copy.rglob("*.*") if p.is_file() or p.is_symlink()
    }
    for name in files - used - {"test/good/.DS_Store"}:
        assert name in skipped or any(name.startswith(f"{folder}/") for folder in skipped), name


def test_all_problems_are_reported_at_once(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("missing mask", "truncated JPEG", "tiny image", "no mask folder"):
        BAD[name].spoil(copy)
    with pytest.raises(SystemExit):
        convert(copy, tmp_path / "out")
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("pipeline convert: ")]
    assert len(errors) == 4


def test_a_class_without_usable_images_is_left_out(copy: Path, tmp_path: Path) -> None:
    for defect in DEFECTS:
        if defect.cls == "misplaced":
            _truncate(f"test/misplaced/{defect.image}")(copy)
    out = convert(copy, tmp_path / "out", "--skip-bad")
    assert Dataset(out).classes == ("crack",)
    skipped = {entry["file"] for entry in read(out / "manifest.json")["skipped"]}
    assert {f"ground_truth/misplaced/{d.mask}" for d in DEFECTS if d.cls == "misplaced"} <= skipped


def test_no_usable_defect_at_all_is_an_error_even_with_skip_bad(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "ground_truth")
    with pytest.raises(SystemExit):
        convert(copy, tmp_path / "out", "--skip-bad")
    assert "expected a defect class with usable images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_and_image_names_that_would_collide_are_reported(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cls, stem in (("a", "b__c"), ("a__b", "c")):  # both: a__b__c
        write(copy / "test" / cls / f"{stem}.png", GREY)
        write(copy / "ground_truth" / cls / f"{stem}_mask.png", GREY)
    with pytest.raises(SystemExit):
        convert(copy, tmp_path / "out")
    assert "becomes a__b__c too" in capsys.readouterr().err


def test_an_image_named_like_a_mask_is_paired_by_name(copy: Path, tmp_path: Path) -> None:
    for stem, rows in (("a", 5), ("a_mask", 8)):
        write(copy / "test" / "crack" / f"{stem}.png", GREY)
        write(
            copy / "ground_truth" / "crack" / f"{stem}_mask.png",
            np.pad(GREY[:rows], ((0, 20 - rows), (0, 0))),
        )
    found = instances(convert(copy, tmp_path / "out"))
    assert [a["bbox"][3] for a in found["crack__a"] + found["crack__a_mask"]] == [5, 8]


@pytest.mark.parametrize(
    ("source", "out", "flags", "message"),
    [
        ("nowhere", "out", [], "--source: expected a folder in MVTec layout, found nothing"),
        ("widget/license.txt", "out", [], "expected a folder in MVTec layout, found a file"),
        ("plain", "out", [], "--source: expected train, test, ground_truth"),
        ("only_good", "out", [], "expected a defect folder in test/ and ground_truth/, found none"),
        ("widget", "widget/out", [], "--out: expected a folder apart from --source"),
        ("widget", ".", [], "--out: expected a folder apart from --source"),
        ("widget", "plain", ["--force"], "--out: expected a new folder or a converted dataset"),
        ("widget", "plain/x/note.txt", [], "--out: expected a folder, found the file"),
        ("widget", "plain/x/note.txt/out", [], "--out: expected a folder that can be written"),
        ("widget", "out", ["--one-per-image", "crak"], "crack, misplaced, found 'crak'"),
        ("widget", "out", ["--unseen", "crak"], "some of crack, misplaced, found"),
        ("widget", "out", ["--unseen", "good"], "some of crack, misplaced, found"),
        ("widget", "out", ["--unseen", "crack", "misplaced"], "can be learned, found all"),
        ("widget", "out", ["--folds", "9"], "--folds: expected at most 8, the images of good"),
        ("widget", "out", ["--fractions", "0.5", "0.1", "0.1"], "expected a sum of 1"),
        ("widget", "out", ["--min-area", "-1"], "--min-area: expected"),
    ],
)  # fmt: skip
def test_impossible_requests(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
    flags: list[str],
    message: str,
) -> None:
    base = copy.parent
    (base / "plain" / "x").mkdir(parents=True)
    (base / "plain" / "x" / "note.txt").write_text("mine")
    write(base / "only_good" / "train" / "good" / "000.png", GREY)
    before = contents(base)
    with pytest.raises(SystemExit) as stop:
        convert(base / source, base / out, *flags)
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert contents(base) == before
