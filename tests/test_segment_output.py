"""`pipeline segment`: mask PNGs, overlaps, islands and holes; and what earlier runs left."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import supervision as sv
from rectangles import draw, filled
from segmented import (
    HEIGHT,
    WIDTH,
    Entry,
    boxes_file,
    brief,
    entry,
    fill_boxes,
    run,
    write_images_and_truth,
)

from pipeline.config import EvaluateConfig, OverlayConfig, build
from pipeline.data import predictions
from pipeline.data.files import decode, read_json
from pipeline.data.masks import decode_rle
from pipeline.errors import UserError
from pipeline.stages import evaluate, overlay, segment


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_truth(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def box_filler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fill_boxes(monkeypatch)


def test_mask_pngs_are_label_maps(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    """Pixels are category ids, and of two that overlap the one with the higher score wins."""
    over, under = (10, 10, 40, 40), (30, 20, 70, 60)
    entries = [entry(3, 2, over, 0.9), entry(3, 1, under, 0.4)]
    run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", entries), masks=True)
    names = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert names == {path.name for path in (dataset / "images").iterdir()}
    labels = decode(tmp_path / "out" / "masks" / "stain__002.png", cv2.IMREAD_UNCHANGED)
    expected = np.where(filled(under, HEIGHT, WIDTH), 1, 0)
    expected[filled(over, HEIGHT, WIDTH)] = 2
    np.testing.assert_array_equal(labels, expected)
    empty = decode(tmp_path / "out" / "masks" / "good__003.png", cv2.IMREAD_UNCHANGED)
    assert empty.shape == (HEIGHT, WIDTH) and not empty.any()


def test_equal_scores_in_a_mask_png(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    """The earlier one wins, as in `--overlaps resolve`."""
    box = (10, 10, 40, 40)
    entries = [entry(3, 2, box, 0.5), entry(3, 1, box, 0.5)]
    run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", entries), masks=True)
    labels = decode(tmp_path / "out" / "masks" / "stain__002.png", cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, 2 * filled(box, HEIGHT, WIDTH))


def test_overlaps_are_resolved_within_a_class_when_asked(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    """A mask that is left empty stays in the results, and every stage takes it."""
    over, under, inside, other = (
        (10, 10, 40, 40),
        (30, 20, 70, 60),
        (32, 22, 38, 38),
        (5, 5, 60, 50),
    )
    entries = [
        entry(3, 2, over, 0.9), entry(3, 2, under, 0.8), entry(3, 2, inside, 0.7),
        entry(3, 1, other, 0.6),
    ]  # fmt: skip
    path = boxes_file(tmp_path / "boxes", entries)
    kept = run(dataset, tmp_path / "kept", path)
    full = [filled(box, HEIGHT, WIDTH) for box in (over, under, inside, other)]
    for result, mask in zip(kept, full, strict=True):
        np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)
    resolved = run(dataset, tmp_path / "resolved", path, overlaps="resolve", masks=True)
    expected = [full[0], full[1] & ~full[0], np.zeros((HEIGHT, WIDTH), bool), full[3]]
    for result, mask in zip(resolved, expected, strict=True):
        np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)
    assert brief(resolved) == brief(kept)
    values: Entry = {"predictions": tmp_path / "resolved"}
    evaluate.run(build(EvaluateConfig, values | {"data": dataset, "out": tmp_path / "evaluation"}))
    overlay.run(build(OverlayConfig, values | {"source": dataset, "out": tmp_path / "a.mp4"}))


def test_islands_and_holes_go_when_asked(
    dataset: Path, tmp_path: Path, box_filler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before overlaps are resolved, so that afterwards there are none."""
    square, hole, speck = (
        filled(box, HEIGHT, WIDTH) for box in ((10, 10, 40, 40), (20, 20, 23, 23), (60, 60, 63, 63))
    )
    rough = (square & ~hole) | speck

    class Rough:
        @classmethod
        def load(cls, source: str, **options: object) -> Rough:
            return cls()

        def segment(self, image: np.ndarray, found: sv.Detections, prompt: str) -> sv.Detections:
            found.mask = np.stack([rough, hole]) if len(found) else None
            found.data["quality"] = np.full(len(found), 0.5, np.float32)
            return found

    monkeypatch.setattr(segment, "Segmenter", Rough)
    entries = [entry(3, 2, (10, 10, 64, 64), 0.9), entry(3, 2, (20, 20, 23, 23), 0.8)]
    path = boxes_file(tmp_path / "boxes", entries)
    for below, expected in ((0, [rough, hole]), (9, [rough, hole]), (10, [square, hole & ~square])):
        options: Entry = {"clean_below": below, "overlaps": "resolve"}
        found = run(dataset, tmp_path / str(below), path, **options)
        for result, mask in zip(found, expected, strict=True):
            np.testing.assert_array_equal(decode_rle(result["segmentation"]), mask)


def test_masks_of_images_that_differ_in_their_suffix(tmp_path: Path, box_filler: list[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.bmp", "a.jpg", "a.png"):
        cv2.imwrite(str(folder / name), draw([], 40, 60))
    run(folder, tmp_path / "out", boxes_file(tmp_path / "boxes", []), masks=True)
    names = sorted(path.name for path in (tmp_path / "out" / "masks").iterdir())
    assert names == ["a.bmp.png", "a.jpg.png", "a.png"]


def test_no_boxes_at_all(dataset: Path, tmp_path: Path, sam: str) -> None:
    """Defined, and no work for the network."""
    results = run(dataset, tmp_path / "out", boxes_file(tmp_path / "boxes", []), sam=sam)
    assert results == []
    assert len(predictions.read_images(tmp_path / "out")[1]) == 5
    assert (tmp_path / "out" / "run.json").is_file()


def test_a_finished_result_is_replaced_only_by_force(
    dataset: Path, tmp_path: Path, box_filler: list[str]
) -> None:
    out = tmp_path / "out"
    before = run(dataset, out, masks=True)
    with pytest.raises(UserError, match="holds a finished result; give --force"):
        run(dataset, out, splits=("test",))
    assert read_json(out / "predictions.json") == before
    after = run(dataset, out, splits=("test",), masks=True, force=True)
    assert {e["image_id"] for e in after} == {3, 5}
    assert len(list((out / "masks").iterdir())) == 3  # none of the earlier run
    run(dataset, out, force=True)
    assert not (out / "masks").exists()


def test_a_foreign_folder_is_refused(dataset: Path, tmp_path: Path, box_filler: list[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="found other files in"):
            run(dataset, tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_run_can_be_repeated(
    dataset: Path, tmp_path: Path, box_filler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "write_predictions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dataset, tmp_path / "out", masks=True)
    assert not (tmp_path / "out" / "run.json").exists()
    assert len(run(dataset, tmp_path / "out", masks=True)) == 4
