"""`pipeline convert`: writing, again and by force; and the output as other libraries read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from converted import PARTS, contents, convert, read
from mvtec_tree import DEFECTS, GOOD, write, write_tree
from pycocotools.coco import COCO

from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.errors import UserError


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
        write(root / "gadget" / part / "dent" / f"{name}.png", np.full((20, 20), 255, np.uint8))
    out = convert(root, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["gadget", "widget"]
    assert Dataset(out / "gadget").classes == ("dent",)
    assert Dataset(out / "widget").classes == ("crack", "misplaced")
    before = contents(out)
    (root / "widget/ground_truth/crack/000_mask.png").unlink()
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
