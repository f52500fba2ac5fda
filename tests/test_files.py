"""Reading and atomic writing of files, and reading a dataset folder."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.dataset import Dataset
from pipeline.data.files import (
    atomic_folder,
    atomic_path,
    list_images,
    read_image,
    read_json,
    sha256,
    write_json,
    write_text,
)
from pipeline.data.masks import encode_rle
from pipeline.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Atomic writing


def test_atomic_path_makes_folders_and_keeps_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.png"
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(path.parent) == {"x.png"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_on_failure(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == {"x.txt"}


def test_atomic_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).touch()
    assert names(path) == {"new"}
    assert names(path.parent) == {"folder"}
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_keeps_the_old_folder_on_failure(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(error), atomic_folder(path) as temporary:
        (temporary / "half").touch()
        raise error
    assert names(path) == {"old"}
    assert names(tmp_path) == {"folder"}


def test_a_process_that_dies_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if target == path:  # the second rename
            raise SystemExit
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(SystemExit), atomic_folder(path) as temporary:
            (temporary / "new").touch()
    assert not path.exists()
    with pytest.raises(ValueError, match="x"), atomic_folder(path):
        assert names(path) == {"old"}  # put back before anything else
        raise ValueError("x")
    assert names(path) == {"old"}
    with atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == {"folder"}
    assert names(path) == {"new"}


# JSON and checksums


def test_json_round_trip_with_unicode(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5, None, "数"]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "ü" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": [value]})
    assert read_json(tmp_path / "x.json") == 1
    assert names(tmp_path) == {"x.json"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_bad_json_is_the_users_to_mend(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json: expected a JSON file, found "):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"y\.json: expected a JSON file, found nothing there"):
        read_json(tmp_path / "y.json")


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # the example of FIPS 180-4
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "x") == expected


# Images

COLOUR = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14  # BGR
GREY = np.array([[0, 255], [7, 128]], np.uint8)


def write_image(path: Path, image: np.ndarray) -> Path:
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("colour.png", COLOUR, COLOUR),
        ("colour.BMP", COLOUR, COLOUR),
        ("colour.tiff", COLOUR, COLOUR),
        ("ü 数.png", COLOUR, COLOUR),
        ("grey.png", GREY, np.dstack([GREY] * 3)),
        ("alpha.png", np.dstack([COLOUR, np.zeros((2, 3), np.uint8)]), COLOUR),
        ("deep.png", COLOUR.astype(np.uint16) * 256 + 255, COLOUR),
        ("deep.tif", COLOUR.astype(np.uint16) * 256, COLOUR),
        ("deep-grey.png", GREY.astype(np.uint16) * 256 + 1, np.dstack([GREY] * 3)),
    ],
)
def test_an_image_of_any_kind_is_read_as_8_bit_bgr(
    tmp_path: Path, name: str, image: np.ndarray, expected: np.ndarray
) -> None:
    found = read_image(write_image(tmp_path / name, image))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    found = "nothing there" if content is None else "a file that cannot be decoded"
    with pytest.raises(UserError, match=rf"x\.png: expected an image, found {found}"):
        read_image(path)


def test_half_a_png_is_no_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = write_image(tmp_path / "x.png", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be decoded"):
        read_image(path)


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.tif", COLOUR.astype(np.float32))
    with pytest.raises(UserError, match=r"x\.tif: expected an 8- or 16-bit image, found float32"):
        read_image(path)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected an image"):
        read_image(tmp_path)


def test_images_are_listed_by_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.tif", ".d.png", "notes.txt", "e.png.part"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.tif"]


# Datasets


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two classes and three images of 6 x 5 pixels: good, one defect, one of each."""
    cut = np.zeros((5, 6), bool)
    cut[1:3, 2:6] = True  # box (2, 1) to (6, 3), 8 pixels
    dent = np.zeros((5, 6), bool)
    dent[4, 0] = True  # one pixel

    def annotation(i: int, image: int, category: int, mask: np.ndarray, bbox: list[int]) -> dict:
        area = int(mask.sum())
        return {"id": i, "image_id": image, "category_id": category, "bbox": bbox, "area": area,
                "segmentation": encode_rle(mask), "iscrowd": 0}  # fmt: skip

    images = [{"id": i, "file_name": f"{i}.png", "width": 6, "height": 5} for i in (3, 1, 2)]
    annotations = [
        annotation(1, 2, 2, dent, [0, 4, 1, 1]),
        annotation(2, 1, 2, dent, [0, 4, 1, 1]),
        annotation(3, 2, 1, cut, [2, 1, 4, 2]),
    ]
    categories = [{"id": 1, "name": "cut"}, {"id": 2, "name": "dent"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    for stem in ("instances", "instances_train", "instances_fold1_test"):
        write_json(tmp_path / "annotations" / f"{stem}.json", truth)
    return tmp_path


def test_a_split_has_its_images_in_file_order_with_their_truth(dataset: Path) -> None:
    read = Dataset(dataset)
    assert read.classes == ("cut", "dent")
    samples = read.split("train")
    assert [sample.image_id for sample in samples] == [3, 1, 2]
    assert samples[0].path == dataset / "images" / "3.png"
    assert [sample.label for sample in samples] == [-1, 1, 0]  # good, dent, the larger of two
    assert len(samples[0].truth) == 0
    truth = samples[2].truth
    np.testing.assert_array_equal(truth.xyxy, [[0, 4, 1, 5], [2, 1, 6, 3]])
    np.testing.assert_array_equal(truth.class_id, [1, 0])
    assert truth.mask is not None and truth.mask.shape == (2, 5, 6)
    assert [int(mask.sum()) for mask in truth.mask] == [1, 8]
    assert np.asarray(truth.mask)[1, 1:3, 2:6].all()


def test_a_fold_is_a_split_of_its_own(dataset: Path) -> None:
    assert len(Dataset(dataset).split("test", fold=1)) == 3


def test_a_split_that_is_missing_lists_those_that_exist(dataset: Path) -> None:
    with pytest.raises(UserError) as caught:
        Dataset(dataset).split("test")
    path = dataset / "annotations" / "instances_test.json"
    assert str(caught.value) == f"{path}: expected this split, found fold1_test, train"


def test_a_split_may_be_missing_but_not_damaged(dataset: Path) -> None:
    read = Dataset(dataset)
    assert read.has_split("train") and read.has_split("test", fold=1)
    assert not read.has_split("val") and not read.has_split("test")
    assert read.split_if_any("val") == []
    assert [sample.image_id for sample in read.split_if_any("train")] == [3, 1, 2]
    path = dataset / "annotations" / "instances_val.json"
    path.write_text('{"images": [')
    assert read.has_split("val")
    with pytest.raises(UserError, match=f"^{path}: expected a JSON file, found Expecting value"):
        read.split_if_any("val")


@pytest.mark.parametrize(
    ("group", "key"),
    [("images", "width"), ("annotations", "bbox"), ("annotations", "image_id")],
)
def test_entries_that_lack_something_are_named(dataset: Path, group: str, key: str) -> None:
    path = dataset / "annotations" / "instances_train.json"
    truth = read_json(path)
    del truth[group][1][key]
    write_json(path, truth)
    with pytest.raises(UserError) as caught:
        Dataset(dataset).split("train")
    expected = f"{path}: expected COCO instances, found other entries (KeyError: '{key}')"
    assert caught.value.problems == (expected,)


@pytest.mark.parametrize("name", ["nothing", "annotations", "annotations/instances.json"])
def test_what_is_no_dataset_is_said_to_be_none(dataset: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected a folder written by `pipeline convert`"):
        Dataset(dataset / name)


def test_other_json_is_no_truth(dataset: Path) -> None:
    write_json(dataset / "annotations" / "instances.json", [1])
    with pytest.raises(UserError, match="expected COCO instances, found other JSON"):
        Dataset(dataset)
