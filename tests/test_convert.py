"""`pipeline convert`: truth worked out by hand, splits, lists and manifest; the real category."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from converted import PARTS, convert, instances, read, union
from mvtec_tree import DEFECTS, GOOD, write_tree
from pycocotools import mask as coco_mask

from pipeline.data.dataset import Dataset


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, to be read only."""
    return write_tree(tmp_path_factory.mktemp("source") / "widget")


@pytest.fixture(scope="module")
def dataset(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted source, to be read only."""
    return convert(tree, tmp_path_factory.mktemp("converted") / "widget", "--folds", "3")


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
