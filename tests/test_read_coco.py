"""COCO files of others: any ids, polygons, run lengths of both kinds, no masks at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.data.coco import read_coco
from pipeline.data.files import write_json
from pipeline.data.masks import encode_rle
from pipeline.errors import UserError

HEIGHT, WIDTH = 20, 30
BOX = [4, 6, 10, 5]  # x, y, width, height


def box_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[6:11, 4:14] = True
    return mask


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, of zeros first, counted by hand."""
    runs, last = [0], False
    for value in mask.T.ravel():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": runs}


def write(root: Path, folder: str = "", **changes: Any) -> Path:
    coco: dict[str, Any] = {
        "images": [
            {"id": 70, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 90, "name": "stain"}, {"id": 3, "name": "crack"}],
        "annotations": [],
    }
    coco |= changes
    (root / folder).mkdir(parents=True, exist_ok=True)
    for image in coco["images"]:
        cv2.imwrite(str(root / folder / image["file_name"]), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_json(root / "annotations" / "some.json", coco)
    return root / "annotations" / "some.json"


def annotation(segmentation: Any, **more: Any) -> dict[str, Any]:
    entry = {"id": 0, "image_id": 7, "category_id": 3, "bbox": BOX, "area": 50}
    return entry | ({} if segmentation is None else {"segmentation": segmentation}) | more


@pytest.mark.parametrize(
    "segmentation",
    [
        [[4, 6, 14, 6, 14, 11, 4, 11]],
        [[4, 6, 9, 6, 9, 11, 4, 11], [9, 6, 14, 6, 14, 11, 9, 11]],  # two parts of one
        encode_rle(box_mask()),
        uncompressed(box_mask()),
    ],
)
def test_masks_of_every_kind(tmp_path: Path, segmentation: Any) -> None:
    classes, samples = read_coco(write(tmp_path, annotations=[annotation(segmentation)]))
    assert classes == ("stain", "crack")
    assert [(s.image_id, s.path.name, len(s.truth)) for s in samples] == [
        (70, "a.png", 0), (7, "b.png", 1),
    ]  # fmt: skip
    truth = samples[1].truth
    assert truth.xyxy.tolist() == [[4, 6, 14, 11]]
    assert truth.class_id is not None and truth.class_id.tolist() == [1]
    assert truth.mask is not None and (np.asarray(truth.mask[0]) == box_mask()).all()
    assert samples[0].label == -1 and samples[1].label == 1


def test_boxes_alone_and_crowds(tmp_path: Path) -> None:
    entries = [annotation(None), annotation([]), annotation(None, iscrowd=1)]
    truth = read_coco(write(tmp_path, annotations=entries))[1][1].truth
    assert len(truth) == 2 and truth.mask is None


@pytest.mark.parametrize("folder", ["", "images", "annotations", "annotations/images"])
def test_images_are_found_near_the_file(tmp_path: Path, folder: str) -> None:
    _, samples = read_coco(write(tmp_path, folder))
    assert samples[0].path == tmp_path / folder / "a.png"


def test_images_in_a_folder_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path, "elsewhere/val2017")
    with pytest.raises(UserError, match=r"found no a.png there \(2 are missing\)"):
        read_coco(path)
    _, samples = read_coco(path, tmp_path / "elsewhere" / "val2017")
    assert samples[1].image().shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": []},
        {"annotations": [annotation(None, category_id=5)]},
        {"annotations": [annotation(None, image_id=5)]},
        {"annotations": [annotation(None, bbox=[1, 2])]},
        {"annotations": [annotation([[1, 2]])]},
        {"annotations": [annotation({"size": [5, 5], "counts": "0"})]},
        {"annotations": 7},
        {"categories": [{"id": 1}]},
        {"images": [{"id": 1, "file_name": "a.png"}]},
    ],
)
def test_what_is_not_coco_is_the_users_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"some.json: expected"):
        read_coco(write(tmp_path, **changes))


def test_other_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1, 2])
    with pytest.raises(UserError, match="expected COCO instances, found other JSON"):
        read_coco(tmp_path / "a.json")
