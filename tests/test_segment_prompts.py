"""`pipeline segment --prompt`: points and masks of the boxes file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rectangles import draw, filled
from segmented import (
    HEIGHT,
    WIDTH,
    Entry,
    boxes_file,
    brief,
    entry,
    fill_boxes,
    rle,
    run,
    write_images_and_truth,
)

from pipeline import cli
from pipeline.data.files import read_json
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_truth(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def shown() -> list[tuple[Any, Any]]:
    """The masks and points that `box_filler` was given, one pair per image."""
    return []


@pytest.fixture
def box_filler(monkeypatch: pytest.MonkeyPatch, shown: list[tuple[Any, Any]]) -> list[str]:
    return fill_boxes(monkeypatch, shown)


@pytest.mark.parametrize("prompt", ["boxes", "points", "boxes+points", "masks", "boxes+masks"])
def test_the_prompt_takes_points_and_masks_of_the_boxes_file(
    dataset: Path, tmp_path: Path, box_filler: list[str], shown: list[Any], prompt: str
) -> None:
    """And leaves alone what it does not ask for: that may be anything."""
    points = {"points": [[3, 4, 1], [40.5, 50, 0]]} if "points" in prompt else {"points": "x"}
    seen = {"segmentation": rle((1, 1, 9, 9))} if "masks" in prompt else {"segmentation": "x"}
    other = {"segmentation": rle((2, 2, 5, 8))} if "masks" in prompt else {}
    entries = [
        {**entry(3, 1, (1, 1, 9, 9), 0.3), **seen, **points},
        {**entry(3, 2, (2, 2, 9, 9), 0.8), **other},
    ]
    path = boxes_file(tmp_path / "boxes", entries)
    run(dataset, tmp_path / "out", path, prompt=prompt, splits=("test",))
    assert box_filler == [prompt] * 3
    masks, given = shown[0]  # the better one comes first
    if "points" in prompt:
        assert [own.tolist() for own in given] == [[], points["points"]]
        assert given[0].shape == (0, 3)
    else:
        assert given is None
    if "masks" in prompt:
        boxes = ((2, 2, 5, 8), (1, 1, 9, 9))
        np.testing.assert_array_equal(masks, [filled(box, HEIGHT, WIDTH) for box in boxes])
    else:
        assert masks is None
    assert all(len(masks or ()) == 0 for masks, _ in shown[1:])


@pytest.mark.parametrize("prompt", ["masks", "boxes+masks"])
def test_a_second_pass_starts_from_the_first_ones_masks(
    dataset: Path, tmp_path: Path, sam: str, prompt: str
) -> None:
    """With a real network: the first pass's results are input as they are, and they count."""
    first = run(dataset, tmp_path / "first", sam=sam)
    again = run(dataset, tmp_path / "again", tmp_path / "first/predictions.json", sam=sam,
                prompt=prompt)  # fmt: skip
    assert brief(again) == brief(first)
    emptied = [{**e, "segmentation": rle((0, 0, 0, 0))} for e in first]
    path = boxes_file(tmp_path / "boxes", emptied)
    empty = run(dataset, tmp_path / "empty", path, sam=sam, prompt=prompt)
    for one, other in zip(again, empty, strict=True):
        assert one["segmentation"] != other["segmentation"]


OTHER_SIZE = rle((1, 1, 9, 9), WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("prompt", "change", "problem"),
    [
        ("masks", {}, "entry 1: expected segmentation, found none"),
        ("boxes+masks", {}, "entry 1: expected segmentation, found none"),
        ("masks", {"segmentation": None}, "entry 1: segmentation: expected COCO's compressed run"),
        ("masks", {"segmentation": [[1, 2, 3, 4, 5, 6]]}, "entry 1: segmentation: expected COCO's"),
        ("masks", {"segmentation": OTHER_SIZE}, "image 3, bbox [2, 2, 7, 7]: segmentation: "
         "expected run lengths of a mask of 72 rows and 96 columns, found {"),
        ("masks", {"segmentation": {"size": [72, 96], "counts": "12"}}, "image 3, bbox [2, 2, 7, "),
        ("points", {"points": []}, "entry 1: points: expected a list of [x, y, label] with label"),
        ("points", {"points": None}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [1, 2, 1]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2, 3]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("points", {"points": [[1, 2, -1]]}, "entry 1: points: expected a list of [x, y, label]"),
        ("boxes+points", {"points": [[float("nan"), 2, 1]]}, "entry 1: points: expected a list"),
        ("boxes+points", {"points": [[1, float("inf"), 1]]}, "entry 1: points: expected a list"),
        ("points", {"points": [[1, 2, 1], [96, 2, 1]]}, "image 3, bbox [2, 2, 7, 7]: points: "
         "expected points in an image of 96 x 72 pixels, found [96, 2, 1]"),
        ("points", {"points": [[1, -0.5, 1]]}, "image 3, bbox [2, 2, 7, 7]: points: expected"),
    ],
)  # fmt: skip
def test_bad_points_and_masks_exit_with_2_and_lose_nothing(
    dataset: Path,
    tmp_path: Path,
    box_filler: list[str],
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    change: Entry,
    problem: str,
) -> None:
    out = tmp_path / "out"
    before = run(dataset, out)
    good = {"segmentation": rle((1, 1, 9, 9)), "points": [[95.5, 71.5, 0]]}
    entries = [
        {**entry(3, 1, (1, 1, 9, 9), 0.3), **good},
        {**entry(3, 2, (2, 2, 9, 9), 0.8), **change},
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    options = ["--source", str(dataset), "--boxes", str(path), "--out", str(out), "--force"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", *options, "--prompt", prompt])
    assert stopped.value.code == 2
    assert f"pipeline segment: {path}: {problem}" in capsys.readouterr().err
    assert read_json(out / "predictions.json") == before
    assert (out / "run.json").is_file()


def test_masks_of_images_of_another_size(tmp_path: Path, box_filler: list[str]) -> None:
    """Where only the image itself tells its size."""
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), draw([], 40, 60))
    entries = [{**entry(1, 1, (1, 1, 9, 9), 0.3), "segmentation": rle((1, 1, 9, 9))}]
    path = boxes_file(tmp_path / "boxes", entries)
    with pytest.raises(UserError, match=r"image 1, .* expected run lengths of a mask of 40 rows"):
        run(folder, tmp_path / "out", path, prompt="masks")
    assert not (tmp_path / "out" / "predictions.json").exists()


@pytest.mark.parametrize("boxes", ["truth", "best.pt"])
def test_masks_need_a_boxes_file(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], boxes: str
) -> None:
    options = ["--source", str(dataset), "--boxes", boxes, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["segment", *options, "--prompt", "boxes+masks"])
    assert stopped.value.code == 2
    problem = "--prompt: expected boxes of a COCO results file for masks, found 'boxes+masks'"
    assert problem in capsys.readouterr().err
