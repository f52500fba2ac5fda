"""The table of measurements, read back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cli
from pipeline.config import MeasureConfig
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import encode_rle
from pipeline.data.predictions import write_predictions
from pipeline.errors import UserError
from pipeline.stages import measure

CLASSES = ("crack", "stain")
HEIGHT, WIDTH = 50, 80
IMAGES = [
    {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
    for i, name in [(7, "b.png"), (3, "a, with a comma.png"), (5, "good.png")]
]


def rectangles(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for x1, y1, x2, y2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


def entry(image_id: int, category: int, score: float, mask: np.ndarray, **more: Any) -> Any:
    box = {"bbox": [0.0, 0.0, 9.0, 9.0]}  # the detector's: not that of the mask
    found = {"image_id": image_id, "category_id": category, "score": score, **box}
    return found | {"segmentation": encode_rle(mask)} | more


RESULTS = [
    entry(3, 1, 0.9, rectangles((10, 20, 30, 24)), quality=0.8125),
    entry(3, 2, 0.25, rectangles((0, 0, 2, 10), (6, 8, 8, 10))),  # two components
    entry(3, 1, 0.24, rectangles((0, 0, 5, 5))),  # under the threshold
    entry(7, 1, 0.5, rectangles((79, 49, 80, 50))),  # one pixel
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_predictions(tmp_path / "predictions", RESULTS, IMAGES, CLASSES)
    return tmp_path


def table(folder: Path, **options: Any) -> list[dict[str, str]]:
    """The lines of the table that these options give."""
    values: dict[str, Any] = {"predictions": folder / "predictions", "out": folder / "m.csv"}
    config = MeasureConfig(**(values | options))
    measure.run(config)
    with config.out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_results(folder: Path, *results: Any) -> None:
    write_json(folder / "predictions" / "predictions.json", list(results))


def test_every_mask_from_the_threshold_on_is_a_line(folder: Path) -> None:
    pixel, crack, stain = table(folder)  # in the order of the images
    assert crack == {
        "image": "a, with a comma.png", "image_id": "3", "class": "crack",
        "score": "0.9", "quality": "0.8125",
        "area": "80", "length": "20", "width": "4", "orientation": "0",
        "centroid_x": "20", "centroid_y": "22",
        "bbox_x": "10", "bbox_y": "20", "bbox_width": "20", "bbox_height": "4",
    }  # fmt: skip
    assert (stain["class"], stain["score"], stain["quality"]) == ("stain", "0.25", "")
    assert [stain[key] for key in ("area", "length", "width", "orientation")] == [
        "24", "10", "8", "90",
    ]  # fmt: skip
    assert (pixel["image"], pixel["image_id"], pixel["area"]) == ("b.png", "7", "1")
    assert (pixel["length"], pixel["width"]) == ("1", "1")
    assert (pixel["centroid_x"], pixel["centroid_y"]) == ("79.5", "49.5")
    assert len(table(folder, threshold=0, force=True)) == 4


def test_millimetres_stand_beside_the_pixels(folder: Path) -> None:
    (_, crack, _), (_, same, _) = table(folder, mm_per_px=0.05), table(folder, force=True)
    assert same.items() <= crack.items()
    assert {key: float(value) for key, value in crack.items() if key not in same} == {
        "area_mm2": 0.2, "length_mm": 1, "width_mm": 0.2, "centroid_x_mm": 1, "centroid_y_mm": 1.1,
        "bbox_x_mm": 0.5, "bbox_y_mm": 1, "bbox_width_mm": 1, "bbox_height_mm": 0.2,
    }  # fmt: skip


def test_tiny_pixels_keep_their_digits(folder: Path) -> None:
    assert float(table(folder, mm_per_px=1e-5)[0]["area_mm2"]) == pytest.approx(1e-10)


def test_the_summary_has_counts_medians_and_the_path(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table(folder)
    out = capsys.readouterr().out
    crack, stain = (line.split() for line in out.splitlines() if "crack" in line or "stain" in line)
    assert crack[1::2] == ["crack", "2", "10.5", "40.5"]  # of 20 and 1, of 80 and 1
    assert stain[1::2] == ["stain", "1", "10", "24"]
    assert out.splitlines()[-1] == f"measurements: {folder / 'm.csv'} (3 masks in 3 images)"
    table(folder, mm_per_px=0.1, threshold=0.5, force=True)
    crack, stain = (
        line.split() for line in capsys.readouterr().out.splitlines() if line[2:7] in CLASSES
    )
    assert crack[1::2] == ["crack", "2", "1.05", "0.405"]
    assert stain[1::2] == ["stain", "0", "–", "–"]


def test_without_a_mask_the_table_has_its_header_alone(folder: Path) -> None:
    write_results(folder)
    assert table(folder) == []
    header = (folder / "m.csv").read_text().splitlines()
    assert header == [",".join(measure.PIXEL_COLUMNS)]


@pytest.mark.parametrize("mm_per_px", [None, 0.1])
def test_an_empty_mask_has_no_size(
    folder: Path, mm_per_px: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(folder, entry(3, 1, 0.9, rectangles()), RESULTS[0])
    empty, other = table(folder, mm_per_px=mm_per_px)
    known = {key for key, value in empty.items() if value and not key.startswith("area")}
    assert known == {"image", "image_id", "class", "score"}
    assert {value for key, value in empty.items() if key.startswith("area")} == {"0"}
    assert other["area"] == "80"
    assert "empty masks: 1 " in capsys.readouterr().out


def test_the_record_beside_the_table_tells_what_it_was_made_from(folder: Path) -> None:
    def record() -> Any:
        return read_json(folder / "m.csv.json")

    table(folder, mm_per_px=0.1)
    first = record()
    assert first["command"] == "measure"
    assert first["options"]["mm_per_px"] == 0.1 and first["options"]["threshold"] == 0.25
    assert first["inputs"].keys() == {"predictions"} and "numpy" in first["packages"]
    table(folder, mm_per_px=0.1, out=folder / "n.csv")
    assert read_json(folder / "n.csv.json")["signature"] == first["signature"]
    write_results(folder, RESULTS[0])
    table(folder, mm_per_px=0.1, force=True)
    assert record()["signature"] != first["signature"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "m.csv", "m.csv.json", "n.csv", "n.csv.json", "predictions",
    ]  # fmt: skip


def test_an_existing_table_is_kept_or_replaced(folder: Path) -> None:
    (folder / "m.csv").write_text("old")
    with pytest.raises(UserError, match="exists; give --force"):
        table(folder)
    assert (folder / "m.csv").read_text() == "old"
    assert len(table(folder, force=True)) == 3


def test_an_interrupted_run_leaves_no_record_of_the_table_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    table(folder)
    monkeypatch.setattr(measure, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table(folder, threshold=0, force=True)
    assert not (folder / "m.csv.json").exists()


def without(key: str) -> Any:
    return {name: value for name, value in RESULTS[0].items() if name != key}


def changed(**values: Any) -> Any:
    return RESULTS[0] | values


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without("segmentation"), "expected a mask in each of 5 entries, found 1 without"),
        (changed(segmentation=None), "expected a mask in each of 5 entries, found 1 without"),
        (changed(image_id=4), "found the id 4, not there"),
        (changed(category_id=3), "image 3: expected a category of 1 to 2, found 3"),
        (
            changed(segmentation=[[1, 1, 5, 1, 5, 5]]),
            "as compressed run lengths, of 50 rows and 80",
        ),
        (changed(segmentation=encode_rle(np.ones((80, 50)))), "'size': [80, 50]"),
        (
            changed(segmentation=encode_rle(np.ones((500, 80))) | {"size": [50, 80]}),
            "image 3: expected a mask as compressed run lengths, of 50 rows and 80",
        ),
    ],
)
def test_predictions_that_cannot_be_measured(
    folder: Path, bad: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "m.csv").write_text("old")
    write_results(folder, *RESULTS, bad)
    with pytest.raises(UserError) as error:
        table(folder, force=True)
    assert message in str(error.value) and len(error.value.problems) == 1
    assert capsys.readouterr() == ("", "")
    assert (folder / "m.csv").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["m.csv", "predictions"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out m.txt", "--out: expected a file ending in .csv, found m.txt"),
        ("--out folder.csv", "--out: expected a file, found the folder folder.csv"),
        ("--out m.csv --mm-per-px 0", "--mm-per-px: expected greater than 0, found '0'"),
        ("--out m.csv --threshold 2", "--threshold: expected less than or equal to 1, found '2'"),
        (
            "--out m.csv --predictions nowhere",
            "nowhere/images.json: expected a JSON file, found nothing there",
        ),
    ],
)
def test_bad_options_are_one_line(
    folder: Path,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    Path("folder.csv").mkdir()
    with pytest.raises(SystemExit) as caught:
        cli.main(["measure", "--predictions", "predictions", *flags.split()])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"pipeline measure: {message}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["folder.csv", "predictions"]
