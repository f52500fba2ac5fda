"""`pipeline convert`: a tree with hand-made truth, all kinds of bad input, the real category."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import yaml
from mvtec_tree import DEFECTS, GOOD, write, write_tree
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.errors import UserError

PARTS = ("train", "val", "test")


def convert(source: Path, out: Path, *flags: str) -> Path:
    """Run the command; returns `out`. A failure is `SystemExit`."""
    cli.main(["convert", "--source", str(source), "--out", str(out), *flags])
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def instances(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """COCO annotations by image stem, in file order."""
    coco = read(folder / "annotations" / "instances.json")
    stems = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    result: dict[str, list[dict[str, Any]]] = {stem: [] for stem in stems.values()}
    for annotation in coco["annotations"]:
        result[stems[annotation["image_id"]]].append(annotation)
    return result


def union(annotations: list[dict[str, Any]]) -> np.ndarray:
    return coco_mask.decode([a["segmentation"] for a in annotations]).any(axis=2)


def contents(folder: Path, *, record: bool = True) -> dict[str, bytes]:
    """Every file's bytes; without `record`, less what names the run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (record or path.name not in ("config.yaml", "run.json"))
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, to be read only."""
    return write_tree(tmp_path_factory.mktemp("source") / "widget")


@pytest.fixture(scope="module")
def dataset(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted source, to be read only."""
    return convert(tree, tmp_path_factory.mktemp("converted") / "widget", "--folds", "3")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A source of its own, to be spoilt."""
    return write_tree(tmp_path / "widget")


# ---------------------------------------------------------------- truth


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.cls}-{defect.image}")
def test_instances_are_those_worked_out_by_hand(dataset: Path, defect: Any) -> None:
    found = instances(dataset)[defect.stem]
    assert [a["bbox"] for a in found] == [[x, y, u - x, v - y] for x, y, u, v in defect.boxes]
    assert [a["area"] for a in found] == list(defect.areas)
    assert {a["category_id"] for a in found} == {1 if defect.cls == "crack" else 2}
    assert {a["iscrowd"] for a in found} == {0}
    for annotation in found:
        assert annotation["segmentation"]["size"] == [defect.height, defect.width]
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"]
        assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]
    assert np.array_equal(union(found), defect.truth)
    assert sum(a["area"] for a in found) == np.count_nonzero(defect.truth), "instances overlap"


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: f"{defect.cls}-{defect.image}")
def test_yolo_labels_are_the_same_boxes(dataset: Path, defect: Any) -> None:
    rows = np.loadtxt(dataset / "labels" / f"{defect.stem}.txt", ndmin=2)
    assert set(rows[:, 0]) == {0 if defect.cls == "crack" else 1}
    x, y, w, h = (rows[:, 1:] * ([defect.width, defect.height] * 2)).T
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    np.testing.assert_allclose(boxes, defect.boxes, atol=1e-6)


def test_every_image_is_there_once_under_its_own_name(tree: Path, dataset: Path) -> None:
    stems = sorted(path.stem for path in (dataset / "images").iterdir())
    good = [f"good__{Path(name).parts[0]}_{Path(name).stem}" for name in GOOD]
    assert stems == sorted([defect.stem for defect in DEFECTS] + good)
    assert stems == sorted(path.stem for path in (dataset / "labels").iterdir())
    for stem in good:
        assert (dataset / "labels" / f"{stem}.txt").read_bytes() == b""


def test_eight_bit_images_keep_their_bytes_and_others_become_8_bit_png(
    tree: Path, dataset: Path
) -> None:
    manifest = read(dataset / "manifest.json")
    converted = {i["source"] for i in manifest["images"] if "converted" in i}
    assert converted == {
        "test/crack/003.tif", "test/crack/004.png", "test/crack/005.tiff", "train/good/003.tif",
    }  # fmt: skip
    for image in manifest["images"]:
        path, source = dataset / image["file"], tree / image["source"]
        if image["source"] not in converted:
            assert path.read_bytes() == source.read_bytes()
            assert path.suffix == source.suffix
            continue
        assert path.suffix == ".png"
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR
        original = np.asarray(cv2.imread(str(source), flags))
        if original.dtype == np.uint16:
            original = (original // 256).astype(np.uint8)
        pixels = np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, original)


def test_min_area_and_one_per_image_are_options(tree: Path, tmp_path: Path) -> None:
    out = convert(tree, tmp_path / "out", "--min-area", "0", "--one-per-image", "crack")
    found = instances(out)
    assert len(found["crack__000"]) == len(found["crack__004"]) == 1
    assert len(found["misplaced__000"]) == 2
    separate = convert(tree, tmp_path / "separate", "--min-area", "0")
    assert len(instances(separate)["crack__004"]) == 3


# ---------------------------------------------------------------- splits, lists, manifest


@pytest.mark.parametrize("fold", [None, 0, 1, 2])
def test_lists_and_coco_files_of_a_split_agree(dataset: Path, fold: int | None) -> None:
    prefix = "" if fold is None else f"fold{fold}_"
    whole = read(dataset / "annotations" / "instances.json")
    listed: list[str] = []
    for part in PARTS:
        lines = (dataset / f"{prefix}{part}.txt").read_text(encoding="utf-8").splitlines()
        assert all((dataset / line).is_file() and line.startswith("./images/") for line in lines)
        coco = read(dataset / "annotations" / f"instances_{prefix}{part}.json")
        assert [f"./images/{image['file_name']}" for image in coco["images"]] == lines
        assert all(image in whole["images"] for image in coco["images"])
        ids = {image["id"] for image in coco["images"]}
        assert coco["annotations"] == [a for a in whole["annotations"] if a["image_id"] in ids]
        listed += lines
    assert sorted(listed) == [f"./images/{image['file_name']}" for image in whole["images"]]
    data = yaml.safe_load(
        (dataset / ("data.yaml" if fold is None else f"fold{fold}.yaml")).read_text()
    )
    assert data == {
        "path": str(dataset),
        **{part: f"{prefix}{part}.txt" for part in PARTS},
        "names": {0: "crack", 1: "misplaced"},
    }


@pytest.mark.parametrize("split", ["fractions", "study"])
def test_an_unseen_class_is_only_ever_tested(tree: Path, tmp_path: Path, split: str) -> None:
    flags = ("--folds", "3", "--split", split)
    plain, out = convert(tree, tmp_path / "plain", *flags), tmp_path / "out"
    convert(tree, out, *flags, "--unseen", "crack")

    def names(folder: Path, prefix: str, part: str) -> tuple[list[str], list[str]]:
        """Those of the unseen class, and all others."""
        coco = read(folder / "annotations" / f"instances_{prefix}{part}.json")
        found = [image["file_name"] for image in coco["images"]]
        unseen = [name for name in found if name.startswith("crack__")]
        return unseen, [name for name in found if name not in unseen]

    tested = []
    for prefix in ("", "fold0_", "fold1_", "fold2_"):
        for part in PARTS:
            unseen, others = names(out, prefix, part)
            before, others_before = names(plain, prefix, part)
            assert others == others_before
            if part != "test":
                assert not unseen and (before or part == "val")
            elif prefix:
                assert unseen == before
                tested += unseen
            else:
                assert len(unseen) == 6
    assert len(tested) == len(set(tested)) == 6
    images = {image["file"]: image for image in read(out / "manifest.json")["images"]}
    assert {i["split"] for i in images.values() if i["class"] == "crack"} == {"test"}
    assert read(out / "manifest.json")["classes"] == ["crack", "misplaced"]


def test_ids_start_at_one(dataset: Path) -> None:
    coco = read(dataset / "annotations" / "instances.json")
    for key in ("images", "annotations", "categories"):
        assert [entry["id"] for entry in coco[key]] == list(range(1, len(coco[key]) + 1))
    assert [category["name"] for category in coco["categories"]] == ["crack", "misplaced"]


def test_manifest_accounts_for_every_file(tree: Path, dataset: Path) -> None:
    manifest = read(dataset / "manifest.json")
    named = [entry["file"] for entry in manifest["skipped"]]
    for image in manifest["images"]:
        named.append(image["source"])
        assert image["sha256"] == hashlib.sha256((tree / image["source"]).read_bytes()).hexdigest()
        if "mask" in image:
            named.append(image["mask"])
            mask = (tree / image["mask"]).read_bytes()
            assert image["mask_sha256"] == hashlib.sha256(mask).hexdigest()
    files = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    assert sorted(named) == sorted(name for name in files if not name.endswith(".DS_Store"))
    assert {e["mask"]: e["components"] for e in manifest["merged"]} == {
        f"ground_truth/{d.cls}/{d.mask}": d.merged for d in DEFECTS if d.merged
    }
    assert manifest["category"] == "widget" and manifest["classes"] == ["crack", "misplaced"]
    for part in PARTS:
        names = (dataset / f"{part}.txt").read_text().split()
        classes = Counter(Path(name).name.split("__")[0] for name in names)
        counts = manifest["counts"][part]
        assert {cls: counts[cls]["images"] for cls in counts} == {
            cls: classes[cls] for cls in counts
        }
        coco = read(dataset / "annotations" / f"instances_{part}.json")
        assert sum(c["instances"] for c in counts.values()) == len(coco["annotations"])


def test_table_shows_images_and_instances(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tree, tmp_path / "out")
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert any(row[:1] == ["crack"] and row[-2:] == ["6", "(8)"] for row in rows)
    assert any(row[:1] == ["all"] and row[-2:] == ["17", "(11)"] for row in rows)


# ---------------------------------------------------------------- bad input


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
        UNREADABLE,
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


# ---------------------------------------------------------------- writing


def test_running_twice_changes_nothing_and_force_replaces(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is no obstacle
    out = convert(tree, tmp_path / "out")
    (out / "labels.cache").write_bytes(b"left by a training")
    first = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    convert(tree, out)
    assert "(unchanged)" in capsys.readouterr().out
    assert contents(out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times

    with pytest.raises(SystemExit) as stop:
        convert(tree, out, "--seed", "1")
    assert stop.value.code == 2
    assert "--force" in capsys.readouterr().err
    assert contents(out) == first

    convert(tree, out, "--seed", "1", "--force")
    assert contents(out)["train.txt"] != first["train.txt"]
    assert "labels.cache" not in contents(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "temporary folders were left"


def test_another_place_gets_identical_bytes(tree: Path, dataset: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tree, tmp_path / "elsewhere" / "widget")
    other = convert(moved, tmp_path / "out", "--folds", "3", "--link", "copy")
    a, b = contents(dataset, record=False), contents(other, record=False)
    for name in [name for name in a if name.endswith(".yaml")]:
        a[name] = a[name].replace(str(dataset).encode(), str(other).encode())
    assert a == b


def _dangle(out: Path) -> None:
    image = out / "images" / "crack__000.png"
    image.unlink()
    image.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "images" / "good__train_000.png").unlink(),
        lambda out: (out / "labels" / "crack__000.txt").write_text(""),
        lambda out: (out / "images" / "crack__000.png").rename(out / "images" / "other.png"),
        _dangle,
        lambda out: (out / "images" / "extra.png").write_bytes(b"x"),
        lambda out: (out / "fold0_test.txt").write_text(""),
    ],
)
def test_a_damaged_output_is_not_taken_for_the_same(
    tree: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    out = convert(tree, tmp_path / "out", "--link", "copy")
    whole = contents(out, record=False)
    damage(out)
    with pytest.raises(SystemExit):
        convert(tree, out, "--link", "copy")
    convert(tree, out, "--link", "copy", "--force")
    assert contents(out, record=False) == whole


def test_force_does_not_delete_what_is_not_ours(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(tree, tmp_path / "out")
    (out / "runs").mkdir()
    (out / "runs" / "best.pt").write_bytes(b"a week of training")
    with pytest.raises(SystemExit):
        convert(tree, out, "--seed", "1", "--force")
    assert "found the folder runs" in capsys.readouterr().err
    assert (out / "runs" / "best.pt").exists()


def test_record_holds_what_reproduces_the_dataset(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.parent)
    out = convert(Path("widget"), tmp_path / "out", "--folds", "3", "--seed", "5")
    config = out / "config.yaml"
    assert config.read_text().startswith(f"# pipeline convert --config {config}\n")
    assert read(out / "run.json")["command"] == "convert"
    monkeypatch.chdir(tmp_path)
    again = tmp_path / "again"
    cli.main(["convert", "--config", str(config), "--out", str(again)])
    assert contents(again / "labels") == contents(out / "labels")
    assert contents(again / "annotations") == contents(out / "annotations")


@pytest.mark.parametrize("link", ["hardlink", "symlink", "copy"])
def test_links(tree: Path, tmp_path: Path, link: str) -> None:
    out = convert(tree, tmp_path / "out", "--link", link)
    image, source = out / "images" / "crack__000.png", tree / "test" / "crack" / "000.png"
    assert image.read_bytes() == source.read_bytes()
    assert image.is_symlink() == (link == "symlink")
    assert image.samefile(source) == (link != "copy")
    if link == "symlink":
        assert image.readlink().is_absolute()


def test_a_hard_link_that_cannot_be_made_becomes_a_copy(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    out = convert(tree, tmp_path / "out")
    image, source = out / "images" / "crack__000.png", tree / "test" / "crack" / "000.png"
    assert image.read_bytes() == source.read_bytes() and not image.samefile(source)


def test_a_jpeg_that_ultralytics_would_rewrite_is_not_linked(copy: Path, tmp_path: Path) -> None:
    source = copy / "train" / "good" / "001.jpg"
    source.write_bytes(source.read_bytes() + b"trailing bytes")
    out = convert(copy, tmp_path / "out")
    assert (out / "images" / "good__train_001.png").is_file()
    assert not (out / "images" / "good__train_001.jpg").exists()


def test_a_root_converts_each_category_with_its_own_classes(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.move(copy, root / "widget")
    (root / "notes").mkdir()
    for part, name in (("test", "000"), ("ground_truth", "000_mask")):
        write(root / "gadget" / part / "dent" / f"{name}.png", GREY)
    out = convert(root, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["gadget", "widget"]
    assert Dataset(out / "gadget").classes == ("dent",)
    assert Dataset(out / "widget").classes == ("crack", "misplaced")
    before = contents(out)
    _remove("widget/ground_truth/crack/000_mask.png")(root)
    with pytest.raises(SystemExit):
        convert(root, out, "--seed", "1", "--force")
    assert contents(out) == before, "a bad category must leave the other one as it was"


def test_nothing_in_the_source_is_touched(copy: Path, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()}
    convert(copy, tmp_path / "out", "--folds", "2")
    convert(copy, tmp_path / "out", "--seed", "3", "--force")
    assert {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file()
    } == before


# ---------------------------------------------------------------- read by others


def test_our_own_reader(dataset: Path) -> None:
    with pytest.raises(UserError, match="expected this split"):
        Dataset(dataset).split("test", fold=3)
    samples = [sample for part in PARTS for sample in Dataset(dataset).split(part, fold=1)]
    assert len(samples) == len(DEFECTS) + len(GOOD)
    defects = {defect.stem: defect for defect in DEFECTS}
    for sample in samples:
        assert sample.image().shape == (sample.height, sample.width, 3)
        defect = defects.get(sample.path.stem)
        assert sample.truth.xyxy.tolist() == [list(box) for box in (defect.boxes if defect else ())]


def test_pycocotools_reads_it(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = COCO(str(dataset / "annotations" / "instances.json"))
    assert len(coco.getImgIds()) == 17 and len(coco.getAnnIds()) == 11
    images = {coco.imgs[i]["file_name"]: i for i in coco.getImgIds()}
    for defect in DEFECTS:
        name = next(name for name in images if Path(name).stem == defect.stem)
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(images[name]))]
        assert np.array_equal(np.any(masks, axis=0), defect.truth)


def test_supervision_reads_it(dataset: Path) -> None:
    import supervision as sv

    found = sv.DetectionDataset.from_coco(
        str(dataset / "images"), str(dataset / "annotations" / "instances.json"), force_masks=True
    )
    assert found.classes == ["crack", "misplaced"] and len(found) == 17
    boxes = {Path(p).stem: found.annotations[p].xyxy for p in found.image_paths}
    for defect in DEFECTS:
        assert boxes[defect.stem].tolist() == [list(box) for box in defect.boxes]


def test_ultralytics_reads_it(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    from ultralytics.data import utils
    from ultralytics.data.dataset import YOLODataset

    monkeypatch.setattr(utils, "check_font", lambda font: None)  # it would download one
    before = contents(copy)
    out = convert(copy, tmp_path / "out", "--folds", "2")
    for name in ("data.yaml", "fold1.yaml"):
        data = utils.check_det_dataset(str(out / name), autodownload=False)
        boxes: dict[str, np.ndarray] = {}
        for part in PARTS:
            loaded = YOLODataset(img_path=data[part], data=data, task="detect", augment=False)
            for label in loaded.get_labels():
                height, width = label["shape"]
                centre, size = label["bboxes"][:, :2], label["bboxes"][:, 2:]
                corners = np.hstack([centre - size / 2, centre + size / 2])
                boxes[Path(label["im_file"]).stem] = corners * [width, height, width, height]
        assert len(boxes) == 17 and sum(map(len, boxes.values())) == 11
        for defect in DEFECTS:
            ours = boxes[defect.stem]
            np.testing.assert_allclose(
                ours[np.argsort(ours[:, 0])], sorted(defect.boxes), atol=1e-4
            )
    assert contents(copy) == before, "the source was changed through a hard link"


# ---------------------------------------------------------------- the real category


@pytest.fixture(scope="module")
def transistor(mvtec_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "transistor"
    return convert(mvtec_root / "transistor", out, "--folds", "5", "--link", "symlink")


def test_real_masks_survive_pixel_for_pixel(mvtec_root: Path, transistor: Path) -> None:
    found = instances(transistor)
    assert len(found) == 313
    assert sum(bool(annotations) for annotations in found.values()) == 40
    assert 35 <= sum(map(len, found.values())) <= 45
    paths = sorted((mvtec_root / "transistor" / "ground_truth").rglob("*_mask.png"))
    assert len(paths) == 40
    for path in paths:
        truth = np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) > 0
        annotations = found[f"{path.parent.name}__{path.stem.removesuffix('_mask')}"]
        assert np.array_equal(union(annotations), truth)
        assert sum(a["area"] for a in annotations) == np.count_nonzero(truth)
        for annotation in annotations:
            rows, columns = np.nonzero(coco_mask.decode(annotation["segmentation"]))
            x, y, w, h = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())


def test_real_splits(transistor: Path) -> None:
    data = Dataset(transistor)
    assert data.classes == ("bent_lead", "cut_lead", "damaged_case", "misplaced")
    assert [len(data.split(part)) for part in PARTS] == [219, 31, 63]
    tested: Counter[int] = Counter()
    for fold in range(5):
        samples = {part: data.split(part, fold) for part in PARTS}
        assert sum(map(len, samples.values())) == 313
        for part in PARTS:
            labels = Counter(sample.label for sample in samples[part])
            assert all(labels[label] >= (2 if part == "test" else 1) for label in range(-1, 4))
        tested.update(sample.image_id for sample in samples["test"])
    assert set(tested.values()) == {1} and len(tested) == 313


def test_real_study_split(mvtec_root: Path, tmp_path: Path) -> None:
    out = convert(
        mvtec_root / "transistor", tmp_path / "out", "--split", "study", "--link", "symlink"
    )
    data = Dataset(out)
    train, val, test = (data.split(part) for part in PARTS)
    assert len(train) + len(val) == 250 and len(test) == 63
    for samples, defects in ((test, 2), (val, 1), (train, 7)):
        labels = Counter(sample.label for sample in samples)
        assert [labels[label] for label in range(4)] == [defects] * 4
