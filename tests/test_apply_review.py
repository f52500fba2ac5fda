"""`pipeline apply-review`: new versions of converted datasets, beside what `convert` writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mvtec_tree import write, write_tree
from rectangles import draw, filled

from pipeline import cli, record
from pipeline.config import FinetuneYoloConfig
from pipeline.data import dataset_folder
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import decode_rle, encode_rle, iou
from pipeline.data.predictions import write_predictions

PARTS = ("train", "val", "test")
FLAGS = ("--folds", "3", "--seed", "1")


def convert(source: Path, out: Path, *flags: str) -> Path:
    cli.main(["convert", "--source", str(source), "--out", str(out), *flags])
    return out


def apply(review: Path, data: Path, out: Path, *flags: str) -> Path:
    argv = ["apply-review", str(review), "--data", str(data), "--out", str(out), *flags]
    cli.main([*argv, "--device", "cpu"])
    return out


def failing(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    """The problems on stderr of `apply`, which must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        apply(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("pipeline apply-review: ") for line in lines if line]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, with the folder's own path left out of them; without the record."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(str(folder).encode(), b"")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("config.yaml", "run.json")
    }


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, times and modes of all that is in a folder."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", s.st_mtime_ns, s.st_mode)
        for path in sorted(folder.rglob("*"))
        for s in [path.stat()]
    }


Images = Sequence[dict[str, Any]]


def write_review(path: Path, dataset: Path, images: Images) -> Path:
    classes = list(Dataset(dataset).classes)
    head = {"format": "pipeline-review", "version": 1, "dataset": dataset.name, "classes": classes}
    write_json(path, {**head, "images": images})
    return path


def said_of(sample: Sample, **said: Any) -> dict[str, Any]:
    size = {"width": sample.width, "height": sample.height}
    name = {"image_id": sample.image_id, "file_name": sample.path.name}
    return {**name, **size, "predictions": [], "missed": [], **said}


def judged(mask: np.ndarray, cls: str, verdict: str, **more: Any) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    said = {"bbox": box, "class": cls, "score": 0.7, "segmentation": encode_rle(mask)}
    return {**said, "verdict": verdict, **more}


def by_name(dataset: Path) -> dict[str, Sample]:
    return {sample.path.stem: sample for sample in Dataset(dataset).images()}


def truth_of(sample: Sample, classes: Sequence[str]) -> list[dict[str, Any]]:
    return [
        judged(decode_rle(a["segmentation"]), classes[a["category_id"] - 1], "accept")
        for a in sample.annotations
    ]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("source") / "widget")


@pytest.fixture(scope="module")
def old(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted dataset with folds, to be read only."""
    return convert(tree, tmp_path_factory.mktemp("converted") / "widget", *FLAGS)


# ---------------------------------------------------------------- nothing changes


@given(data=st.data())
@settings(
    max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_accepting_what_is_labelled_reproduces_the_dataset(
    old: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Of any images, none among them: byte for byte, apart from the manifest's list of reviews."""
    dataset = Dataset(old)
    samples = data.draw(st.lists(st.sampled_from(dataset.images()), unique=True))
    said = [said_of(s, predictions=truth_of(s, dataset.classes)) for s in samples]
    review = write_review(tmp_path / "review.json", old, said)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    new = apply(review, old, tmp_path / "new")
    before, after = contents(old), contents(new)
    manifest = json.loads(after.pop("manifest.json"))
    (applied,) = manifest.pop("reviews")
    assert manifest == json.loads(before.pop("manifest.json"))
    assert after == before
    labelled = sum(len(s.annotations) for s in samples)
    assert applied["summary"] == ({"already labelled": labelled} if labelled else {})


def test_the_old_version_is_not_touched(old: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(old, tmp_path / "old")
    samples = by_name(copy)
    review = write_review(tmp_path / "review.json", copy, [
        said_of(samples["crack__000"], predictions=[
            judged(filled((30, 20, 40, 25), 40, 64), "crack", "reject"),
            judged(filled((10, 30, 20, 38), 40, 64), "misplaced", "accept"),
        ]),
        said_of(samples["good__train_000"], missed=[{"bbox": [2, 2, 9, 9], "class": "crack"}]),
    ])  # fmt: skip
    before = state(copy)
    new = apply(review, copy, tmp_path / "new", "--conflicts", "take-review")
    assert state(copy) == before
    for path in (copy / "images").iterdir():
        assert path.samefile(new / "images" / path.name)
    assert contents(new) != contents(copy)


# ---------------------------------------------------------------- what is written


def test_corrected_labels_are_what_convert_would_have_written(
    tree: Path, old: Path, tmp_path: Path
) -> None:
    """Beside a conversion of masks that were corrected by hand."""
    corrected = shutil.copytree(tree, tmp_path / "corrected" / "widget")
    samples = by_name(old)
    more = filled((40, 30, 50, 38), 40, 64)  # below the other components, so the last one
    mask = cv2.imread(str(tree / "ground_truth/crack/000_mask.png"), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    write(corrected / "ground_truth/crack/000_mask.png", mask | more.astype(np.uint8) * 255)
    gone = decode_rle(samples["crack__004"].annotations[1]["segmentation"])
    rest = decode_rle(samples["crack__004"].annotations[0]["segmentation"])
    write(corrected / "ground_truth/crack/004_mask.png", rest.astype(np.uint8) * 255)
    review = write_review(tmp_path / "review.json", old, [
        said_of(samples["crack__000"], predictions=[judged(more, "crack", "accept")]),
        said_of(samples["crack__004"], predictions=[judged(gone, "crack", "reject")]),
    ])  # fmt: skip
    new = apply(review, old, tmp_path / "new", "--conflicts", "take-review")
    expected, found = contents(convert(corrected, tmp_path / "by-hand", *FLAGS)), contents(new)
    hashes = ("sha256", "mask_sha256")
    manifests = [json.loads(each.pop("manifest.json")) for each in (expected, found)]
    for manifest in manifests:
        manifest.pop("reviews", None), manifest.pop("merged")  # of the masks before
        for image in manifest["images"]:
            for key in hashes:
                image.pop(key, None)
    assert manifests[0] == manifests[1]
    assert json.loads(found.pop("hard_negatives.json")) == [
        {"image_id": samples["crack__004"].image_id, "category_id": 1,
         "bbox": [40, 40, 6, 6], "score": 0.7}
    ]  # fmt: skip
    assert found == expected


def test_images_keep_ids_names_and_splits_when_their_class_changes(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = by_name(old)
    good, crack = samples["good__train_000"], samples["crack__002"]
    label = decode_rle(crack.annotations[0]["segmentation"])
    review = write_review(tmp_path / "review.json", old, [
        said_of(good, missed=[{"bbox": [4, 5, 12.5, 10], "class": "crack"}], note="see: ü"),
        said_of(crack, predictions=[
            judged(label, "crack", "accept", changed_class="misplaced")
        ]),
    ])  # fmt: skip
    capsys.readouterr()
    new = apply(review, old, tmp_path / "new", "--conflicts", "take-review")
    out = capsys.readouterr().out
    before, after = Dataset(old), Dataset(new)
    for fold in (None, 0, 1, 2):
        for part in PARTS:
            pairs = zip(before.split(part, fold), after.split(part, fold), strict=True)
            assert all((a.image_id, a.path.name) == (b.image_id, b.path.name) for a, b in pairs)
    found = by_name(new)
    assert [found[s].label for s in ("good__train_000", "crack__002")] == [0, 1]
    manifest = read_json(new / "manifest.json")
    classes = {Path(image["file"]).stem: image["class"] for image in manifest["images"]}
    assert (classes["good__train_000"], classes["crack__002"]) == ("crack", "misplaced")
    assert sum(part["good"]["images"] for part in manifest["counts"].values()) == 7  # of 8
    (applied,) = manifest["reviews"]
    assert applied["summary"] == {"added": 1, "class changed": 1}
    assert applied["notes"] == [{"file": "good__train_000.png", "note": "see: ü"}]
    assert len(applied["conflicts"]) == 1 and applied["resolution"] == "take-review"
    change = next(c for c in applied["changes"] if c["change"] == "class changed")
    assert (change["was"], change["class"]) == ("crack", "misplaced")
    table = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["crack", "8", "1", "–", "1", "8"] in table  # before, drawn, class taken, left, after
    assert ["misplaced", "3", "–", "1", "–", "4"] in table


def test_a_corrected_test_label_is_said(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = next(s for s in Dataset(old).split("test") if not s.annotations)
    mask = filled((3, 3, 9, 9), sample.height, sample.width)
    said = said_of(sample, predictions=[judged(mask, "crack", "accept")])
    new = apply(write_review(tmp_path / "r.json", old, [said]), old, tmp_path / "new")
    assert "test images whose labels changed: 1; figures" in capsys.readouterr().out
    tested = {s.path.name: s for s in Dataset(new).split("test")}
    assert len(tested[sample.path.name].annotations) == 1


# ---------------------------------------------------------------- masks of drawn boxes


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright rectangles on a dark ground; the last image has two, of which one is not labelled."""
    source = tmp_path_factory.mktemp("rectangles") / "plates"
    boxes = [(20, 15, 50, 40), (40, 30, 80, 60), (10, 20, 30, 60), (60, 10, 85, 35)]
    for i, box in enumerate(boxes):
        both = [("stain", box)] + ([("stain", (15, 40, 45, 65))] if i == 3 else [])
        write(source / "test" / "stain" / f"{i:03}.png", draw(both, 72, 96, i))
        mask = filled(box, 72, 96).astype(np.uint8) * 255
        write(source / "ground_truth" / "stain" / f"{i:03}_mask.png", mask)
        write(source / "train" / "good" / f"{i:03}.png", draw([], 72, 96, 10 + i))
    return convert(source, source.parent / "dataset")


def test_sam_draws_the_mask_of_a_drawn_box_as_segment_does(
    rectangles: Path, tmp_path: Path
) -> None:
    sample = by_name(rectangles)["stain__003"]
    drawn = [13.5, 38.5, 33.0, 28.0]
    said = said_of(sample, missed=[{"bbox": drawn, "class": "stain"}])
    review = write_review(tmp_path / "r.json", rectangles, [said])
    new = apply(review, rectangles, tmp_path / "new")
    labels = by_name(new)["stain__003"].annotations
    assert labels[0] == sample.annotations[0] | {"id": labels[0]["id"]}
    mask = decode_rle(labels[1]["segmentation"])
    assert iou(mask, filled((15, 40, 45, 65), 72, 96)) > 0.8
    assert read_json(new / "manifest.json")["reviews"][0]["boxes_as_masks"] == []

    entry = {"image_id": sample.image_id, "category_id": 1, "bbox": drawn, "score": 1.0}
    write_predictions(tmp_path / "boxes", [entry], [], ["stain"])
    boxes = tmp_path / "boxes" / "predictions.json"
    cli.main([
        "segment", "--source", str(rectangles), "--boxes", str(boxes), "--device", "cpu",
        "--splits", "train", "val", "test", "--out", str(tmp_path / "segmented"),
    ])  # fmt: skip
    (segmented,) = read_json(tmp_path / "segmented" / "predictions.json")
    assert segmented["segmentation"] == labels[1]["segmentation"]


def test_accepted_boxes_without_masks_are_drawn_too(rectangles: Path, tmp_path: Path) -> None:
    sample = by_name(rectangles)["stain__003"]
    for segmentation in ({}, {"segmentation": encode_rle(np.zeros((72, 96), bool))}):
        box = {"bbox": [14, 39, 32, 27], "class": "stain", "score": 0.8, "verdict": "accept"}
        said = said_of(sample, predictions=[box | segmentation])
        review = write_review(tmp_path / "r.json", rectangles, [said])
        new = apply(review, rectangles, tmp_path / "new", "--force")
        mask = decode_rle(by_name(new)["stain__003"].annotations[1]["segmentation"])
        assert iou(mask, filled((15, 40, 45, 65), 72, 96)) > 0.8


def test_where_sam_outlines_something_else_the_box_is_the_mask(
    rectangles: Path, tmp_path: Path, sam: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights outline nothing. The box reaches over the border by rounding."""
    sample = by_name(rectangles)["good__train_000"]
    said = said_of(sample, missed=[{"bbox": [90.6, 60.2, 5.6, 12.1], "class": "stain"}])
    review = write_review(tmp_path / "r.json", rectangles, [said])
    new = apply(review, rectangles, tmp_path / "new", "--sam", sam)
    (label,) = by_name(new)["good__train_000"].annotations
    assert (label["bbox"], label["area"]) == ([90, 60, 6, 12], 72)
    assert "the box is the mask, since SAM outlined something else: good__train_000.png" in (
        capsys.readouterr().out
    )
    assert len(read_json(new / "manifest.json")["reviews"][0]["boxes_as_masks"]) == 1


# ---------------------------------------------------------------- hard negatives


def test_hard_negatives_add_up_and_can_be_withdrawn(rectangles: Path, tmp_path: Path) -> None:
    samples = by_name(rectangles)
    one, two = samples["good__train_000"], samples["good__train_001"]
    dirt, other = filled((5, 5, 25, 25), 72, 96), filled((50, 40, 70, 60), 72, 96)
    first = write_review(tmp_path / "1.json", rectangles, [
        said_of(one, predictions=[judged(dirt, "stain", "reject")]),
        said_of(two, predictions=[judged(dirt, "stain", "reject", score=0.25)]),
    ])  # fmt: skip
    new = apply(first, rectangles, tmp_path / "new")
    assert not (rectangles / "hard_negatives.json").exists()
    found = by_name(new)
    assert [len(found[s.path.stem].hard_negatives) for s in (one, two)] == [1, 1]
    assert found[two.path.stem].hard_negatives[0] == {
        "image_id": two.image_id, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.25
    }  # fmt: skip
    assert not one.hard_negatives and not found["stain__000"].hard_negatives

    second = write_review(tmp_path / "2.json", new, [
        said_of(one, predictions=[judged(other, "stain", "reject")]),
        said_of(two, predictions=[judged(dirt, "stain", "accept")]),
    ])  # fmt: skip
    newer = apply(second, new, tmp_path / "newer")
    found = by_name(newer)
    assert [h["bbox"] for h in found[one.path.stem].hard_negatives] == [
        [5, 5, 20, 20], [50, 40, 20, 20]
    ]  # fmt: skip
    assert not found[two.path.stem].hard_negatives and found[two.path.stem].label == 0
    reviews = read_json(newer / "manifest.json")["reviews"]
    assert [r["review"] for r in reviews] == ["1.json", "2.json"]
    assert reviews[1]["summary"] == {"hard negative": 1, "added": 1, "withdrawn": 1}


# ---------------------------------------------------------------- conflicts and bad input


def test_conflicts_are_named_and_stop_or_are_decided(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = by_name(old)["crack__000"]
    labels = [decode_rle(a["segmentation"]) for a in sample.annotations]
    said = [
        judged(labels[0], "misplaced", "accept"),
        judged(labels[1], "crack", "reject"),
    ]
    review = write_review(tmp_path / "r.json", old, [said_of(sample, predictions=said)])
    place = f"{review}: image crack__000.png ({sample.image_id}): "
    assert failing(capsys, review, old, tmp_path / "new") == [
        f"{place}accepted misplaced at [0, 0, 5, 4] overlaps label crack at [0, 0, 5, 4]",
        f"{place}rejected crack at [30, 20, 10, 5] overlaps label crack at [30, 20, 10, 5]",
        "--conflicts: expected keep-labels or take-review to decide 2 conflicts, found neither: "
        "nothing is written",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    kept = apply(review, old, tmp_path / "kept", "--conflicts", "keep-labels")
    assert by_name(kept)["crack__000"].annotations == sample.annotations
    assert not (kept / "hard_negatives.json").exists()
    taken = apply(review, old, tmp_path / "taken", "--conflicts", "take-review")
    (label,) = by_name(taken)["crack__000"].annotations
    assert (label["bbox"], label["category_id"]) == ([0, 0, 5, 4], 2)
    assert len(by_name(taken)["crack__000"].hard_negatives) == 1


def test_bad_input_is_named_and_nothing_is_written(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(old, tmp_path / "data")
    review = write_review(tmp_path / "r.json", data, [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("mine")
    crack = by_name(data)["crack__000"]
    strange = write_review(tmp_path / "s.json", data, [
        said_of(crack, image_id=99), said_of(by_name(data)["crack__001"], width=99)
    ])  # fmt: skip
    drawn = write_review(tmp_path / "d.json", data, [
        said_of(crack, missed=[{"bbox": [10, 10, 9, 9], "class": "crack"}])
    ])  # fmt: skip
    inner = write_review(shutil.copytree(old, tmp_path / "older") / "r.json", data, [])
    new, before = tmp_path / "new", state(tmp_path)
    table: list[tuple[tuple[Any, ...], list[str]]] = [
        ((tmp_path / "none.json", data, new), [f"{tmp_path}/none.json: expected a review"]),
        ((review, tmp_path / "other", new), [f"{tmp_path}/other: expected a folder written by"]),
        ((review, data, tmp_path / "other"), ["--out: expected a new folder or a converted"]),
        ((review, data, tmp_path / "r.json"), ["--out: expected a folder, found the file"]),
        (
            (inner, data, inner.parent, "--force"),
            ["--out: expected a folder apart from review, found"],
        ),
        ((review, data, data), ["--out: expected a folder apart from --data"]),
        ((review, data, data / "new"), ["--out: expected a folder apart from --data"]),
        ((review, data, new, "--images", str(tmp_path / "x")), ["--images: expected a folder"]),
        ((review, data, new, "--conflicts", "x"), ["--conflicts: expected 'report', 'keep-labels"]),
        ((review, data, new, "--folds", "3"), ["--folds: unknown flag"]),
        (
            (strange, data, new),
            [
                f"{strange}: images[0] (crack__000.png).image_id: expected {crack.image_id}, found",
                f"{strange}: images[1] (crack__001.jpg): expected the size of the image, 40 x 64",
            ],
        ),
        ((drawn, data, new, "--sam", str(review)), [f"{review}: expected a SAM checkpoint"]),
        ((drawn, data, new, "--sam", "sam"), ["sam: expected"]),
    ]
    for arguments, expected in table:
        found = failing(capsys, *arguments)
        assert len(found) == len(expected), (arguments, found)
        for line, start in zip(found, expected, strict=True):
            assert line.startswith(start), (arguments, found)
        assert state(tmp_path) == before, arguments


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json: expected a JSON"),
    "another manifest": (lambda d: write_json(d / "manifest.json", []), "expected that of a"),
    "ids with a gap": (
        lambda d: _edit(d, lambda coco: coco["images"].pop(0)), "expected images with ids from 1",
    ),
    "a label without mask": (
        lambda d: _edit(d, lambda coco: coco["annotations"][0].pop("segmentation")),
        "expected a mask of each label",
    ),
    "a split that is missing": (
        lambda d: (d / "annotations" / "instances_val.json").unlink(), "expected this split",
    ),
    "a manifest of other entries": (
        lambda d: write_json(d / "manifest.json", {"images": [1]}), "expected that of a dataset",
    ),
    "hard negatives of another class": (
        lambda d: write_json(
            d / "hard_negatives.json",
            [{"image_id": 1, "category_id": 9, "bbox": [1, 1, 2, 2], "score": 1}],
        ),
        "expected category ids up to 2, found 9",
    ),
    "hard negatives that are none": (
        lambda d: (d / "hard_negatives.json").write_text("{}"), "expected a list of COCO results",
    ),
}  # fmt: skip


def _edit(dataset: Path, change: Callable[[Any], object]) -> None:
    path = dataset / "annotations" / "instances.json"
    coco = read_json(path)
    if change(coco) and len(coco["images"]) < 17:  # no annotation of an image that is gone
        ids = {image["id"] for image in coco["images"]}
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
    write_json(path, coco)


@pytest.mark.parametrize(("spoil", "text"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_dataset_is_one_clear_line(
    old: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    text: str,
) -> None:
    data = shutil.copytree(old, tmp_path / "data")
    review = write_review(tmp_path / "r.json", data, [])
    spoil(data)
    (line,) = failing(capsys, review, data, tmp_path / "new")
    assert line.startswith(str(data)) and text in line
    assert not (tmp_path / "new").exists()


def test_another_result_is_replaced_only_if_forced(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_review(tmp_path / "1.json", old, [])
    note = said_of(by_name(old)["crack__000"], note="dirt")
    two = write_review(tmp_path / "2.json", old, [note])
    new = apply(one, old, tmp_path / "new")
    before = state(new)
    capsys.readouterr()
    apply(one, old, new)
    assert "(unchanged)" in capsys.readouterr().out and state(new) == before
    cli.main(["apply-review", "--config", str(new / "config.yaml")])
    assert "(unchanged)" in capsys.readouterr().out and state(new) == before
    (line,) = failing(capsys, two, old, new)
    assert "holds a different dataset; give --force" in line and state(new) == before
    apply(two, old, new, "--force")
    assert [r["review"] for r in read_json(new / "manifest.json")["reviews"]] == ["2.json"]


def test_convert_never_replaces_a_reviewed_dataset(
    tree: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = apply(write_review(tmp_path / "r.json", old, []), old, tmp_path / "new")
    before = state(new)
    with pytest.raises(SystemExit) as caught:
        convert(tree, new, "--force")
    assert caught.value.code == 2 and state(new) == before
    assert "found reviews in" in capsys.readouterr().err


def test_a_failure_leaves_nothing(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    review = write_review(tmp_path / "r.json", old, [])
    real = dataset_folder.place_image

    def fail_later(image: Path, *rest: Any, **options: Any) -> None:
        if "misplaced" in image.name:
            raise KeyboardInterrupt
        real(image, *rest, **options)

    monkeypatch.setattr(dataset_folder, "place_image", fail_later)
    with pytest.raises(SystemExit) as caught:
        apply(review, old, tmp_path / "new")
    assert caught.value.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_what_is_trained_on_a_version_depends_on_its_review(old: Path, tmp_path: Path) -> None:
    note = said_of(by_name(old)["crack__000"], note="dirt")
    one = apply(write_review(tmp_path / "1.json", old, []), old, tmp_path / "one")
    two = apply(write_review(tmp_path / "2.json", old, [note]), old, tmp_path / "two")
    again = apply(tmp_path / "1.json", old, tmp_path / "again")
    prints = [record.fingerprint(data) for data in (old, one, two, again)]
    assert len(set(prints)) == 3 and prints[1] == prints[3]
    made = read_json(two / "run.json")
    assert made["command"] == "apply-review" and {"review", "data", "sam"} == set(made["inputs"])
    config = FinetuneYoloConfig(data=two, out=tmp_path / "detector")
    assert record.inputs_of(config)["data"] == prints[2]


# ---------------------------------------------------------------- images that are new


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images that are not in the dataset: two defective ones, two good ones, one without a word."""
    for name, defects in {
        "000.png": [("stain", (20, 15, 50, 40))],
        "001.tif": [("stain", (30, 20, 60, 50))],
        "good.png": [],
        "noted.png": [],
        "unseen.png": [],
    }.items():
        write(tmp_path / "line 3" / name, draw(defects, 72, 96, len(name) + ord(name[2])))
    return tmp_path / "line 3"


def seen(name: str, image_id: int, **said: Any) -> dict[str, Any]:
    size = {"image_id": image_id, "file_name": name, "width": 96, "height": 72}
    return {**size, "predictions": [], "missed": [], **said}


def reviewed_folder(path: Path, dataset: Path) -> Path:
    mask = filled((20, 15, 50, 40), 72, 96)
    dirt = filled((5, 5, 25, 25), 72, 96)
    return write_review(path, dataset, [
        seen("000.png", 1, predictions=[judged(mask, "stain", "accept")]),
        seen("001.tif", 2, missed=[{"bbox": [29, 19, 32, 32], "class": "stain"}]),
        seen("good.png", 3, predictions=[judged(dirt, "stain", "reject")]),
        seen("noted.png", 4, note="blurred"),
    ])  # fmt: skip


@pytest.mark.parametrize("folds", [0, 3])
def test_new_images_join_the_training_images(
    rectangles: Path, folder: Path, tmp_path: Path, folds: int
) -> None:
    old = rectangles
    if folds:
        source = Path(read_json_source(rectangles))
        old = convert(source, tmp_path / "folded", "--folds", str(folds))
    review = reviewed_folder(tmp_path / "r.json", old)
    new = apply(review, old, tmp_path / "new", "--images", str(folder))
    before, after = Dataset(old), Dataset(new)
    names = ["stain__line 3_000.png", "stain__line 3_001.png", "good__line 3_good.png"]
    added = after.images()[8:]
    assert [s.path.name for s in added] == names
    assert [s.image_id for s in added] == [9, 10, 11]
    assert [len(s.annotations) for s in added] == [1, 1, 0]
    assert [len(s.hard_negatives) for s in added] == [0, 0, 1]
    assert [s.path.name for s in after.split("train")] == [
        *(s.path.name for s in before.split("train")), *names
    ]  # fmt: skip
    for part in ("val", "test"):
        assert (old / f"{part}.txt").read_bytes() == (new / f"{part}.txt").read_bytes()
    assert np.array_equal(added[1].image(), cv2.imread(str(folder / "001.tif")))
    if folds:
        tested = [[s.image_id for s in samples] for samples in after.folds()]  # each image once
        assert sorted(i for samples in tested for i in samples) == list(range(1, 12))
        for fold in range(folds):
            for part in PARTS:
                lines = (new / f"fold{fold}_{part}.txt").read_text(encoding="utf-8").splitlines()
                samples = after.split(part, fold)
                assert lines == [f"./images/{s.path.name}" for s in samples]
                kept = [s.image_id for s in after.split(part, fold) if s.image_id <= 8]
                assert kept == [s.image_id for s in before.split(part, fold)]
    entries = {e["file"]: e for e in read_json(new / "manifest.json")["images"]}
    assert entries["images/stain__line 3_001.png"]["source"] == "line 3/001.tif"
    assert entries["images/stain__line 3_001.png"]["split"] == "train"
    assert "TIFF" in entries["images/stain__line 3_001.png"]["converted"]
    assert read_json(new / "manifest.json")["counts"]["train"]["good"]["images"] == 1 + sum(
        s.label < 0 for s in before.split("train")
    )


def read_json_source(dataset: Path) -> str:
    text = (dataset / "config.yaml").read_text(encoding="utf-8")
    return next(line.removeprefix("source: ") for line in text.splitlines() if "source: " in line)


def test_new_images_that_cannot_join_are_named(
    rectangles: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    review = reviewed_folder(tmp_path / "r.json", rectangles)
    flags = ("--images", str(folder))
    new = apply(review, rectangles, tmp_path / "new", *flags)
    lines = failing(capsys, review, new, tmp_path / "newer", *flags)  # once more
    assert [line.split(": expected")[0] for line in lines] == [
        str(folder / name) for name in ("000.png", "001.tif", "good.png")
    ]
    assert all("not in the dataset, found images/" in line for line in lines)
    shutil.copy(rectangles / "images" / "stain__000.png", folder / "000.png")  # maybe a test image
    (line,) = failing(capsys, review, rectangles, tmp_path / "newer", *flags)
    assert line.startswith(f"{folder / '000.png'}: expected an image that is not in the dataset")
    (folder / "000.png").write_bytes(b"x")
    (line,) = failing(capsys, review, rectangles, tmp_path / "newer", *flags)
    assert line == f"{folder / '000.png'}: expected an image, found a file that cannot be decoded"
    (folder / "000.png").unlink()
    (line,) = failing(capsys, review, rectangles, tmp_path / "newer", *flags)
    assert line == f"{review}: images[0] (000.png): expected an image of that name, found none"
    write(folder / "000.png", draw([], 72, 96, 99))
    write(folder / "000.bmp", draw([], 72, 96, 98))
    said = read_json(review)
    said["images"].append(seen("000.bmp", 9, predictions=said["images"][0]["predictions"]))
    write_json(review, said)
    (line,) = failing(capsys, review, rectangles, tmp_path / "newer", *flags)
    assert line == (
        f"{folder / '000.bmp'}: expected a name of its own, found stain__line 3_000 taken"
    )
    assert not (tmp_path / "newer").exists()
