"""Labels to annotation tools and back: `pipeline export`, `pipeline import`.

The formats are read and written by the tools' own libraries, see annotation_tools.py; tests that
need them are skipped where `make tools` was not run, or fail with PIPELINE_REQUIRE_TOOLS=1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.data.exchange import label_studio, outline
from pipeline.data.masks import encode_rle
from pipeline.data.predictions import write_predictions
from tests.mvtec_tree import DEFECTS, write_tree

ROOT = Path(__file__).parents[1]
TOOLS = Path(os.environ.get("PIPELINE_TOOLS_PYTHON") or ROOT / ".venv-tools" / "bin" / "python")
EXACT = ("cvat", "label-studio", "coco", "fiftyone", "datumaro")
FORMATS = (*EXACT, "yolo-seg")
Masks = dict[str, list[tuple[str, bytes]]]  # file name -> class and pixels, sorted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of images of many sizes, with holes, single pixels and parts; two folds."""
    root = tmp_path_factory.mktemp("exchange")
    write_tree(root / "mvtec")
    run("convert", "--source", root / "mvtec", "--out", root / "data", "--folds", 2)
    return root / "data"


def run(*argv: object) -> None:
    cli.main([str(argument) for argument in argv])


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a command that ends with 2 says on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def tool(*argv: object) -> str:
    """What annotation_tools.py prints; the test is skipped without the library."""
    give_up = pytest.fail if os.environ.get("PIPELINE_REQUIRE_TOOLS") else pytest.skip
    if not TOOLS.is_file():
        give_up(f"expected annotation tools (`make tools`), found no {TOOLS}")
    command = [str(TOOLS), str(ROOT / "tests" / "annotation_tools.py"), *map(str, argv)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


def truth(mirrored: bool = False, emptied: str = "") -> Masks:
    """The masks of the tree as it was drawn, by the name of each image's file but its suffix."""
    masks: Masks = {}
    for defect in DEFECTS:
        if defect.mask.endswith(".jpg"):  # its mask rings
            continue
        instances = []
        for x1, y1, x2, y2 in defect.boxes:
            mask = np.zeros_like(defect.truth)
            mask[y1:y2, x1:x2] = defect.truth[y1:y2, x1:x2]
            instances.append((defect.cls, (np.fliplr(mask) if mirrored else mask).tobytes()))
        masks[defect.stem] = [] if defect.stem == emptied else sorted(instances)
    return masks


def masks_in(root: Path) -> Masks:
    """The masks of a dataset, as `truth` has them."""
    dataset = Dataset(root)
    ours = set(truth())
    return {
        sample.path.stem: sorted(
            (dataset.classes[c], mask.tobytes())
            for c, mask in zip(sample.truth.class_id, sample.truth.mask, strict=True)
        )
        if sample.annotations
        else []
        for sample in dataset.images()
        if sample.path.stem in ours
    }


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- Formats that keep every pixel, read and written by their own libraries ----------------------


@pytest.mark.parametrize("form", EXACT)
def test_a_tool_reads_every_mask_to_the_pixel(form: str, data: Path, tmp_path: Path) -> None:
    run("export", "--data", data, "--to", form, "--out", tmp_path / "out")
    found = json.loads(tool("read", form, tmp_path / "out"))
    dataset = Dataset(data)
    assert {Path(name).stem for name in found} == {s.path.stem for s in dataset.images()}
    masks = {Path(name).stem: image for name, image in found.items()}
    for stem, expected in truth().items():
        height, width = masks[stem]["size"]
        decoded = sorted(
            (cls, coco_mask.decode({"size": [height, width], "counts": counts}).tobytes())
            for cls, counts, _ in masks[stem]["instances"]
        )
        assert decoded == expected, stem


@pytest.mark.parametrize("form", [form for form in EXACT if form != "fiftyone"])
def test_what_a_tool_corrects_becomes_a_new_version(form: str, data: Path, tmp_path: Path) -> None:
    run("export", "--data", data, "--to", form, "--out", tmp_path / "out")
    emptied = "crack__000"
    tool("correct", form, tmp_path / "out", tmp_path / "back", f"{emptied}.png")
    before = content(data)
    source = ("--from", form, "--source", tmp_path / "back")
    run("import", *source, "--data", data, "--out", tmp_path / "new")
    assert content(data) == before
    assert masks_in(tmp_path / "new") == truth(mirrored=True, emptied=emptied)
    old, new = Dataset(data), Dataset(tmp_path / "new")
    for part in ("train", "val", "test"):
        for fold in (None, 0, 1):
            assert [(s.image_id, s.path.name) for s in new.split(part, fold)] == [
                (s.image_id, s.path.name) for s in old.split(part, fold)
            ]


def test_what_fiftyone_corrects_becomes_a_new_version(data: Path, tmp_path: Path) -> None:
    """Its own writer moves masks by up to a pixel; what it wrote is read to the pixel."""
    run("export", "--data", data, "--to", "fiftyone", "--out", tmp_path / "out")
    tool("correct", "fiftyone", tmp_path / "out", tmp_path / "back", "crack__000.png")
    source = ("--from", "fiftyone", "--source", tmp_path / "back")
    run("import", *source, "--data", data, "--out", tmp_path / "new")
    written = COCO(str(tmp_path / "back" / "labels.json"))
    names = {category["id"]: category["name"] for category in written.cats.values()}
    found = masks_in(tmp_path / "new")
    for image in written.imgs.values():
        stem = Path(image["file_name"]).stem
        if stem in found:
            annotations = written.imgToAnns[image["id"]]
            masks = [(names[a["category_id"]], written.annToMask(a)) for a in annotations]
            assert found[stem] == sorted((cls, mask.tobytes()) for cls, mask in masks)
    expected = truth(mirrored=True, emptied="crack__000")
    assert {k: [c for c, _ in v] for k, v in found.items()} == {
        k: [c for c, _ in v] for k, v in expected.items()
    }


@pytest.mark.parametrize("form", EXACT)
def test_predictions_go_out_with_their_scores(form: str, data: Path, tmp_path: Path) -> None:
    predict(data, tmp_path / "predictions")
    source = ("--data", data, "--predictions", tmp_path / "predictions")
    run("export", *source, "--to", form, "--out", tmp_path / "out", "--threshold", 0.3)
    found = json.loads(tool("read", form, tmp_path / "out"))
    ring, square = expected_predictions()
    assert {name: image["instances"] for name, image in found.items()} == {
        "crack__001.jpg": [["crack", ring, 0.75]],
        "crack__003.png": [["misplaced", square, 0.5]],
        "good__test_000.png": [],
    }


def expected_predictions() -> list[str]:
    """Run lengths of two masks, the first one with a hole."""
    ring, square = np.zeros((64, 40), bool), np.zeros((50, 50), bool)
    ring[5:20, 3:30] = True
    ring[8:12, 10:20] = False
    square[40:50, 45:50] = True
    return [encode_rle(mask)["counts"] for mask in (ring, square)]


def predict(data: Path, folder: Path) -> None:
    """Predictions of three images: one mask each on two, one of a low score, and an empty one."""
    dataset = Dataset(data)
    by_name = {sample.path.name: sample for sample in dataset.images()}
    chosen = [by_name[n] for n in ("crack__001.jpg", "crack__003.png", "good__test_000.png")]
    images = [
        {"id": s.image_id, "file_name": s.path.name, "width": s.width, "height": s.height}
        for s in chosen
    ]

    def entry(i: int, category: int, score: float, counts: str) -> dict[str, Any]:
        size = [chosen[i].height, chosen[i].width]
        return {
            "image_id": chosen[i].image_id,
            "category_id": category,
            "bbox": [1, 1, 5, 5],
            "score": score,
            "segmentation": {"size": size, "counts": counts},
        }

    ring, square = expected_predictions()
    empty = encode_rle(np.zeros((50, 50), bool))["counts"]
    results = [entry(0, 1, 0.75, ring), entry(0, 2, 0.29, ring)]
    results += [entry(1, 2, 0.5, square), entry(1, 1, 0.9, empty)]
    write_predictions(folder, results, images, dataset.classes)


# ---- There and back by ourselves -----------------------------------------------------------------


@pytest.mark.parametrize("form", EXACT)
def test_what_nobody_touched_is_the_same_dataset(form: str, data: Path, tmp_path: Path) -> None:
    run("export", "--data", data, "--to", form, "--out", tmp_path / "out")
    source = ("--from", form, "--source", tmp_path / "out")
    run("import", *source, "--data", data, "--out", tmp_path / "new")
    for name in ("annotations/instances.json", "annotations/instances_fold1_test.json"):
        assert (tmp_path / "new" / name).read_bytes() == (data / name).read_bytes()
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert [entry["corrected"] for entry in manifest.pop("imports")] == [[]]
    assert manifest == json.loads((data / "manifest.json").read_text())


def test_images_that_the_source_lacks_keep_their_labels(data: Path, tmp_path: Path) -> None:
    predict(data, tmp_path / "predictions")
    source = ("--data", data, "--predictions", tmp_path / "predictions")
    run("export", *source, "--to", "coco", "--out", tmp_path / "out")
    archive = shutil.make_archive(str(tmp_path / "back"), "zip", tmp_path / "out")
    run("import", "--from", "coco", "--source", archive, "--data", data, "--out", tmp_path / "new")
    masks = masks_in(tmp_path / "new")
    assert masks["crack__003"] == [("misplaced", square_pixels())]
    assert len(masks["crack__001"]) == 2  # with the one at 0.29
    unchanged = truth()
    for stem in ("crack__001", "crack__003"):
        masks.pop(stem), unchanged.pop(stem)
    assert masks == unchanged


def square_pixels() -> bytes:
    square = np.zeros((50, 50), bool)
    square[40:50, 45:50] = True
    return square.tobytes()


def test_hard_negatives_stay_unless_they_are_labelled(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    ids = {sample.path.name: sample.image_id for sample in Dataset(data).images()}
    labelled, free = (
        {"image_id": ids[name], "category_id": 1, "bbox": box, "score": 0.5}
        for name, box in (("crack__003.png", [5, 5, 10, 9]), ("good__test_000.png", [1, 1, 5, 5]))
    )
    (copy / "hard_negatives.json").write_text(json.dumps([labelled, free]))
    run("export", "--data", copy, "--to", "cvat", "--out", tmp_path / "out")
    source = ("--from", "cvat", "--source", tmp_path / "out" / "annotations.xml")
    run("import", *source, "--data", copy, "--out", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "hard_negatives.json").read_text()) == [free]


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 300))))
def test_brush_masks_come_back(mask: np.ndarray) -> None:
    height, width = mask.shape
    assert np.array_equal(label_studio.unpack(label_studio.pack(mask), width, height), mask)


def test_a_brush_mask_of_literal_and_half_transparent_pixels() -> None:
    """What Label Studio's own brush leaves: values written one by one, alpha between 0 and 255."""
    values = [9, 9, 9, 255, 0, 0, 0, 0, 7, 7, 7, 1]  # three pixels, RGBA
    bits = f"{12:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "01" + f"{11:04b}" + "".join(f"{value:08b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    packed = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert label_studio.unpack(packed, 3, 1).tolist() == [[True, False, True]]
    with pytest.raises(ValueError, match="cut off"):
        label_studio.unpack(packed[:-3], 3, 1)


# ---- Polygons ------------------------------------------------------------------------------------


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_a_polygon_loses_nothing_but_between_parts(mask: np.ndarray) -> None:
    if not mask.any():
        return
    height, width = mask.shape
    corners = outline.polygon(mask)
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.allclose([*corners.min(axis=0), *corners.max(axis=0)], box, atol=0.011)
    parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    drawn = outline.filled(corners, height, width)
    loss = outline.loss(mask, drawn)
    assert loss.missing == 0 and loss.added == (drawn & ~mask).sum()
    assert parts > 2 or loss.iou == 1


def test_the_loss_of_polygons_is_printed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two masks have two parts: squares 19 pixels apart, and a square with a speck at 4 pixels."""
    run("export", "--data", data, "--to", "yolo-seg", "--out", tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "polygons: 9 of 11 masks to the pixel" in printed
    mean = (9 + 200 / (200 + 19) + 39 / (39 + 4)) / 11
    assert f"mean IoU {mean:.4f}, worst {39 / (39 + 4):.4f} (crack__004.png)" in printed
    assert "0 pixels lost, 23 added, 1 of 1 holes kept" in printed


def test_polygons_come_back(data: Path, tmp_path: Path) -> None:
    run("export", "--data", data, "--to", "yolo-seg", "--out", tmp_path / "out")
    source = ("--from", "yolo-seg", "--source", tmp_path / "out")
    run("import", *source, "--data", data, "--out", tmp_path / "new")
    masks, expected = masks_in(tmp_path / "new"), truth()
    for stem in expected:
        assert masks[stem] == expected[stem] or stem in ("crack__004", "misplaced__000")


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.fixture
def exported(data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The dataset in the format that the test names, for it to break."""
    run("export", "--data", data, "--to", request.param, "--out", tmp_path / "back")
    return tmp_path / "back"


def edit_xml(path: Path, **attributes: str) -> None:
    """Change attributes of the first mask, or with `image_`, of its image."""
    tree = ElementTree.parse(path)
    image = next(i for i in tree.iter("image") if i.find("mask") is not None)
    for key, value in attributes.items():
        place = image if key.startswith("image_") else image.find("mask")
        assert place is not None
        place.set(key.removeprefix("image_"), value)
    tree.write(path)


def double(path: Path) -> None:
    """List the first image twice."""
    tree = ElementTree.parse(path)
    tree.getroot().append(next(tree.iter("image")))
    tree.write(path)


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


XML = "annotations.xml"
INSTANCES = "annotations/instances_default.json"
DM = "annotations/default.json"
BAD = [
    ("cvat", lambda f: (f / XML).write_text((f / XML).read_text()[:900]), "expected CVAT's XML"),
    ("cvat", lambda f: (f / XML).write_text(""), "expected CVAT's XML"),
    ("cvat", lambda f: (f / XML).write_text("<a/>"), "expected <annotations>, found <a>"),
    ("cvat", lambda f: (f / XML).unlink(), "expected annotations.xml or *.xml in"),
    ("cvat", lambda f: edit_xml(f / XML, rle="1, 2, 3"), "expected run lengths of"),
    ("cvat", lambda f: edit_xml(f / XML, rle="1, x"), "invalid literal"),
    ("cvat", lambda f: edit_xml(f / XML, left="60"), "expected a mask inside of 64 x 40 pixels"),
    ("cvat", lambda f: edit_xml(f / XML, label="dent"), "found 'dent' on 1 masks"),
    ("cvat", lambda f: edit_xml(f / XML, image_name="b.png"), "b.png: expected an image of"),
    ("cvat", lambda f: edit_xml(f / XML, image_width="99"), "expected 64x40 pixels, found 99x40"),
    (
        "cvat",
        lambda f: double(f / XML),
        "crack__000.png: expected it once, found it 2 times",
    ),
    (
        "label-studio",
        lambda f: (f / "tasks.json").write_text("[]"),
        "expected labelled images, found none",
    ),
    ("label-studio", lambda f: (f / "tasks.json").write_text("{}"), "expected a list of"),
    ("label-studio", lambda f: (f / "tasks.json").write_text('[{"data": '), "expected a JSON file"),
    (
        "label-studio",
        lambda f: edit_json(f / "tasks.json", lambda c: shorten(c)),
        "expected a whole mask, found one that is cut off",
    ),
    (
        "label-studio",
        lambda f: edit_json(f / "tasks.json", lambda c: value_of(c).pop("format")),
        "expected brush masks with a label, found brushlabels",
    ),
    (
        "label-studio",
        lambda f: edit_json(f / "tasks.json", lambda c: value_of(c).update(brushlabels=["dent"])),
        "found 'dent' on 1 masks",
    ),
    (
        "coco",
        lambda f: (f / INSTANCES).write_text("[]"),
        "expected COCO instances, found other JSON",
    ),
    (
        "coco",
        lambda f: edit_json(f / INSTANCES, lambda c: c["annotations"][0].pop("segmentation")),
        "annotation 1: expected a mask, found none",
    ),
    (
        "coco",
        lambda f: edit_json(f / INSTANCES, lambda c: c["annotations"][0].update(category_id=9)),
        "expected COCO instances, found other entries (KeyError: 9)",
    ),
    (
        "coco",
        lambda f: edit_json(f / INSTANCES, lambda c: c["images"][0].update(height=7)),
        "a mask of",
    ),
    ("datumaro", lambda f: (f / DM).write_text("{}"), "expected datumaro's categories and items"),
    (
        "datumaro",
        lambda f: edit_json(f / DM, lambda c: c["items"][0]["annotations"][0].update(type="bbox")),
        "crack__000.png: expected masks or polygons, found a bbox",
    ),
    ("yolo-seg", lambda f: (f / "data.yaml").unlink(), "data.yaml: expected a YAML file"),
    ("yolo-seg", lambda f: shutil.rmtree(f / "labels"), "expected label files in"),
    (
        "yolo-seg",
        lambda f: (f / "labels" / "crack__000.txt").write_text("0 0.5 0.5 0.1 0.1"),
        "line 1: expected a polygon of three corners or more, found 4 values",
    ),
    (
        "yolo-seg",
        lambda f: (f / "labels" / "crack__000.txt").write_text("7 0 0 0 1 1 1"),
        "line 1: expected a class of data.yaml, found 7",
    ),
    (
        "yolo-seg",
        lambda f: (f / "labels" / "crack__000.txt").write_text("0 0 0 0 1 1 3"),
        "line 1: expected corners of 0 to 1",
    ),
    (
        "yolo-seg",
        lambda f: (f / "labels" / "other.txt").write_text(""),
        "other: expected an image of",
    ),
]


def value_of(tasks: Any) -> Any:
    answers = (task["annotations"][0]["result"] for task in tasks)
    return next(result[0]["value"] for result in answers if result)


def shorten(tasks: Any) -> None:
    value_of(tasks)["rle"] = value_of(tasks)["rle"][:-3]


@pytest.mark.parametrize(("exported", "spoil", "message"), BAD, indirect=["exported"])
def test_labels_that_do_not_fit(
    exported: Path,
    spoil: Any,
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    spoil(exported)
    form = request.node.callspec.params["exported"]
    before = content(data)
    source = ("--from", form, "--source", exported)
    error = fails(capsys, "import", *source, "--data", data, "--out", tmp_path / "new")
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "new").exists() and content(data) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_zip_file_that_is_cut_off(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "back.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations.xml", "<annotations/>" * 50)
    source = ("--from", "cvat", "--source", path, "--data", data, "--out", tmp_path / "new")
    assert f"{path}/annotations.xml: expected CVAT's XML" in fails(capsys, "import", *source)
    path.write_bytes(path.read_bytes()[:60])
    assert f"{path}: expected CVAT's XML" in fails(capsys, "import", *source)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--from coco --source nothing", "--source: expected a file or a folder, found nothing at"),
        ("--from yolo-seg --source nothing", "--source: expected a folder with data.yaml and"),
        ("--from voc --source {data}", "--from: expected 'cvat', 'label-studio'"),
        ("--source {data}", "--from: required, not given"),
    ],
)
def test_import_without_anything_to_read(
    flags: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [flag.format(data=data) for flag in flags.split()]
    error = fails(capsys, "import", *argv, "--data", data, "--out", tmp_path / "new")
    assert message in error, error


def test_an_import_never_writes_over_what_it_reads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", "--data", data, "--to", "coco", "--out", tmp_path / "out")
    source = ("--from", "coco", "--source", tmp_path / "out", "--data", data)
    before = content(data)
    error = fails(capsys, "import", *source, "--out", data, "--force")
    assert "--out: expected a folder apart from --data" in error
    assert content(data) == before
    run("import", *source, "--out", tmp_path / "new")
    error = fails(capsys, "convert", "--source", data.parent / "mvtec", "--out", tmp_path / "new",
                  "--force")  # fmt: skip
    assert "expected a dataset without a person's work in it, found imports" in error


def test_an_export_replaces_nothing_but_an_export(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data", data, "--to", "coco", "--out")
    before = content(data)
    assert "apart from --data" in fails(capsys, "export", *flags, data, "--force")
    assert content(data) == before
    other = shutil.copytree(data, tmp_path / "other")
    error = fails(capsys, "export", *flags, other, "--force")
    assert "--out: expected a new folder or one of export, found convert's" in error
    assert content(other) == before
    run("export", *flags, tmp_path / "out")
    assert "give --force to replace it" in fails(capsys, "export", *flags, tmp_path / "out")
    run("export", "--data", data, "--to", "cvat", "--out", tmp_path / "out", "--force")
    assert not (tmp_path / "out" / "annotations").exists()


def test_predictions_of_other_images_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(data, tmp_path / "predictions")
    flags = ("--data", data, "--predictions", tmp_path / "predictions", "--to", "cvat")
    edit_json(tmp_path / "predictions" / "images.json", lambda c: c["images"][0].update(width=9))
    error = fails(capsys, "export", *flags, "--out", tmp_path / "out")
    assert "expected crack__001.jpg with 40x64 pixels, found crack__001.jpg with 9x64" in error
    assert not (tmp_path / "out").exists()


def test_a_link_to_images_is_what_was_asked_for(data: Path, tmp_path: Path) -> None:
    for link, form in (("hardlink", "coco"), ("symlink", "fiftyone"), ("copy", "yolo-seg")):
        out = tmp_path / link
        run("export", "--data", data, "--to", form, "--out", out, "--link", link)
        image = next(out.rglob("crack__000.png"))
        assert image.samefile(data / "images" / image.name) == (link != "copy")
        assert image.is_symlink() == (link == "symlink")
        assert image.read_bytes() == (data / "images" / image.name).read_bytes()
