"""`pipeline segment --anomaly`: scores and heat maps beside the boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rectangles import Defects, write_dataset
from segmented import TEST, VAL, boxes_file, entry, fill_boxes, run, write_images_and_truth

from pipeline import record
from pipeline.config import DetectAnomalyConfig, EvaluateConfig, build
from pipeline.data import heatmaps
from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError
from pipeline.stages import detect_anomaly, evaluate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_truth(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture
def box_filler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fill_boxes(monkeypatch)


ANOMALY: dict[str, tuple[Defects, ...]] = {
    "train": ([], [], [], [], [("scratch", (10, 12, 40, 30))]),
    "val": VAL,
    "test": TEST,
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and the run of an anomaly detector on it."""
    root = tmp_path_factory.mktemp("anomaly")
    data = write_dataset(root / "d", ANOMALY)
    options = {"image_size": 64, "coreset": 0.2, "device": "cpu"}
    values = {"source": data, "out": root / "run", **options}
    detect_anomaly.run(build(DetectAnomalyConfig, values))
    return data, root / "run"


def test_an_anomaly_detector_looks_at_the_same_images(
    known: tuple[Path, Path], tmp_path: Path, box_filler: list[str]
) -> None:
    data, fitted = known
    results = boxes_file(tmp_path / "boxes", [entry(8, 2, (50, 40, 90, 64), 0.9)])
    run(data, tmp_path / "out", results, anomaly=fitted)
    threshold = read_json(fitted / "metrics.json")["image"]["threshold"]
    expected = {its.image_id: its for its in heatmaps.read_scores(fitted)}
    found = {its.image_id: its for its in heatmaps.read_scores(tmp_path / "out")}
    images = read_json(tmp_path / "out" / "images.json")["images"]
    assert found.keys() == expected.keys() == {image["id"] for image in images} == set(range(6, 11))
    for image in images:
        mine, its = found[image["id"]], expected[image["id"]]
        assert mine.score == pytest.approx(its.score, rel=1e-3)
        assert image["anomaly"] == {"score": mine.score, "threshold": threshold}
        assert (mine.split, mine.cls, mine.file_name) == (its.split, its.cls, its.file_name)
        np.testing.assert_allclose(mine.heat_map(), its.heat_map(), rtol=0.01)

    # Image 10 is a defect without a box: anomalous, no known class. Either way of telling agrees.
    def unknown(out: str, predictions: Path, **options: Any) -> Any:
        values = {"data": data, "predictions": predictions, "out": tmp_path / out, "resamples": 0}
        evaluate.run(build(EvaluateConfig, values | {"threshold": 0.5} | options))
        return read_json(tmp_path / out / "metrics.json")["unknown"]

    plain = run(data, tmp_path / "plain", results) and tmp_path / "plain"
    own, named = unknown("own", tmp_path / "out"), unknown("named", plain, anomaly=fitted)
    assert own.pop("threshold")["value"] == named.pop("threshold")["value"]
    assert own == named
    assert own["images_per_class"] == {"good": 0, "scratch": 0, "stain": 1}
    assert "10,stain__009.png,stain,unknown,miss" in (tmp_path / "own" / "images.csv").read_text()

    # Another run leaves nothing of this one.
    run(data, tmp_path / "out", results, force=True)
    assert not any("anomaly" in i for i in read_json(tmp_path / "out" / "images.json")["images"])
    assert not {"scores.json", "heatmaps"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_anomaly_scores_of_a_folder_of_images(
    known: tuple[Path, Path], tmp_path: Path, box_filler: list[str]
) -> None:
    data, fitted = known
    results = boxes_file(tmp_path / "boxes", [])
    run(data / "images", tmp_path / "out", results, anomaly=fitted, anomaly_threshold=-1)
    assert record.record_path(tmp_path / "out").is_file()
    scored = heatmaps.read_scores(tmp_path / "out")
    assert len(scored) == 10 and {(its.split, its.cls) for its in scored} == {(None, None)}
    images = read_json(tmp_path / "out" / "images.json")["images"]
    assert {image["anomaly"]["threshold"] for image in images} == {-1}


@pytest.mark.parametrize(
    ("made", "options", "problem"),
    [
        (
            {"image": {"threshold": None}},
            {},
            "--anomaly: expected a threshold in {}/metrics.json, ",
        ),
        (
            {"fold": 1},
            {},
            "--anomaly: expected a run of the dataset's single split, found one of the dataset's "
            "fold 1: {}",
        ),
        (
            {"protocol": "mvtec"},
            {"anomaly_threshold": 1.0},
            "--anomaly: expected a run of the dataset's single split, found one of an MVTec "
            "category, which may have learned images of the dataset's splits: {}",
        ),
        (None, {}, "{}/metrics.json: expected a JSON file, found nothing there"),
        ({"fold": None}, {}, "{}/model.safetensors: expected an anomaly detector of "),
    ],
)
def test_a_run_that_cannot_be_used(
    known: tuple[Path, Path],
    tmp_path: Path,
    box_filler: list[str],
    made: dict[str, Any] | None,
    options: dict[str, Any],
    problem: str,
) -> None:
    folder = tmp_path / "run"
    if made is not None:
        write_json(folder / "metrics.json", {**read_json(known[1] / "metrics.json"), **made})
    with pytest.raises(UserError) as raised:
        run(known[0], tmp_path / "out", anomaly=folder, **options)
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(problem.format(folder))
    assert not (tmp_path / "out").exists()


def test_an_anomaly_threshold_needs_a_run(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--anomaly-threshold: expected --anomaly beside it"):
        run(dataset, tmp_path / "out", anomaly_threshold=1.0)
