"""benchmarks/masks: what is measured, against masks whose figures are known by construction."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from rectangles import Box, draw, filled

from pipeline import cli
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import encode_rle
from pipeline.data.predictions import write_predictions
from pipeline.errors import UserError

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "masks"
HEIGHT, WIDTH = 72, 96
CHEAP = ["box_filled", "grabcut", "sam_lite_shipped"]
# Class, and for each instance its box and the box of a hole in it. The IoU of the filled box is
# the part that the hole leaves.
IMAGES: tuple[tuple[str, tuple[tuple[Box, Box, float], ...]], ...] = (
    ("scratch", (((10, 12, 40, 32), (20, 16, 30, 22), 0.9),)),
    ("scratch", (((30, 20, 50, 40), (32, 22, 42, 32), 0.75),)),
    ("stain", (((5, 5, 15, 15), (7, 7, 12, 11), 0.8), ((50, 40, 90, 60), (60, 45, 70, 53), 0.9))),
    ("stain", (((20, 30, 60, 50), (30, 35, 50, 45), 0.75),)),
)
KEYS = {
    "instances", "missed", "mean_iou", "mean_iou_interval", "p10_iou", "iou_per_class",
    "p10_iou_per_class", "dice", "boundary_f1", "ms_per_box",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/masks/run.py, with two folds."""
    sys.path.insert(0, str(BENCHMARK))
    module = importlib.import_module("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FOLDS", 2)
        yield module
    sys.path.remove(str(BENCHMARK))


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a category of the images above."""
    root = tmp_path_factory.mktemp("mvtec")
    counts: dict[str, int] = {}
    for seed, (cls, instances) in enumerate(IMAGES):
        name = f"{counts.setdefault(cls, 0):03}"
        counts[cls] += 1
        mask = np.zeros((HEIGHT, WIDTH), bool)
        for box, hole, _ in instances:
            mask |= filled(box, HEIGHT, WIDTH) & ~filled(hole, HEIGHT, WIDTH)
        image = draw([(cls, box) for box, _, _ in instances], HEIGHT, WIDTH, seed)
        write(root / "transistor" / "test" / cls / f"{name}.png", image)
        write(root / "transistor" / "ground_truth" / cls / f"{name}_mask.png", mask * np.uint8(255))
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            image = draw([], HEIGHT, WIDTH, 10 + i)
            write(root / "transistor" / part / "good" / f"{i:03}.png", image)
    return root


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def call(bench: ModuleType, mvtec: Path, work: Path, *options: str) -> dict[str, Any]:
    """Run a part of the benchmark; returns its results."""
    bench.main(["--mvtec-root", str(mvtec), "--work", str(work), *options])
    return read_json(work / "results.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def results(bench: ModuleType, mvtec: Path, work: Path) -> dict[str, Any]:
    """The cheap methods on both folds."""
    return call(bench, mvtec, work, "--methods", *CHEAP)


def test_every_row_has_every_figure(results: dict[str, Any], work: Path) -> None:
    rows = {
        f"{row}/{boxes}"
        for row in ("box_filled/any", "grabcut/whole", "grabcut/zoom",
                    "sam_lite_shipped/whole", "sam_lite_shipped/zoom")
        for boxes in ("truth_boxes", "jittered_boxes")
    }  # fmt: skip
    assert set(results["summary"]) == rows
    for key, row in results["summary"].items():
        assert set(row) == (KEYS | {"quality"} if key.startswith("sam") else KEYS)
        low, high = row["mean_iou_interval"]
        assert 0 <= low <= row["mean_iou"] <= high <= 1
        assert (row["instances"], row["missed"]) == (5, 0)
        assert row["ms_per_box"] >= 0
    assert {"date", "versions", "machine", "seed", "command"} <= results.keys()
    assert results["folds"] == {"count": 2, "measured": [0, 1]}
    assert cv2.imread(str(work / "results.png")) is not None


def test_every_instance_is_measured_once(results: dict[str, Any], work: Path) -> None:
    found = [(i["image"], i["index"], i["class"]) for i in results["instances"]]
    expected = []
    for entry in read_json(work / "dataset" / "annotations" / "instances.json")["images"]:
        cls, number = entry["file_name"].removesuffix(".png").split("__")
        if cls != "good":
            images = [instances for name, instances in IMAGES if name == cls]
            expected += [(entry["file_name"], i, cls) for i in range(len(images[int(number)]))]
    assert found == expected
    assert all(i["iou"].keys() == results["summary"].keys() for i in results["instances"])
    dataset = Dataset(work / "dataset")
    for instance in results["instances"]:
        tested = [sample.path.name for sample in dataset.split("test", instance["fold"])]
        assert instance["image"] in tested


def test_filled_boxes_by_hand(results: dict[str, Any]) -> None:
    """A filled box covers the instance and its hole: IoU 1 - hole / box, Dice 2 IoU / (1 + IoU)."""
    row = results["summary"]["box_filled/any/truth_boxes"]
    parts = [iou for _, instances in IMAGES for _, _, iou in instances]
    key = "box_filled/any/truth_boxes"
    assert [i["iou"][key] for i in results["instances"]] == pytest.approx(parts)
    assert row["mean_iou"] == pytest.approx(np.mean([0.9, 0.75, 0.8, 0.9, 0.75]))
    assert row["iou_per_class"] == pytest.approx({"scratch": 0.825, "stain": 2.45 / 3}, abs=1e-4)
    assert row["p10_iou"] == 0.75
    # between the two lowest of stain, 0.75 and 0.8, at 10 % of 2 steps
    assert row["p10_iou_per_class"] == pytest.approx({"scratch": 0.765, "stain": 0.76})
    assert row["dice"] == pytest.approx(np.mean([2 * p / (1 + p) for p in parts]), abs=1e-4)
    assert row["mean_iou_interval"][0] < row["mean_iou"] < row["mean_iou_interval"][1]
    assert results["summary"]["box_filled/any/jittered_boxes"]["mean_iou"] < row["mean_iou"]


def test_rows_join_what_was_measured_before(
    bench: ModuleType,
    mvtec: Path,
    work: Path,
    results: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "HERE", tmp_path)

    def add(*options: str) -> dict[str, Any]:
        call(bench, mvtec, work, *options, "--add")
        return read_json(tmp_path / "results.json")

    first = add("--methods", "sam_lite_shipped", "--views", "zoom")
    assert set(first["summary"]) == {
        "sam_lite_shipped/zoom/truth_boxes",
        "sam_lite_shipped/zoom/jittered_boxes",
    }
    assert first["earlier"] == []
    add("--methods", "box_filled")
    joined = add("--methods", "grabcut", "sam_lite_shipped")
    assert joined["summary"] == results["summary"]  # in its order, too
    assert list(joined["summary"]) == list(results["summary"])
    assert joined["instances"] == results["instances"]
    (earlier,) = joined["earlier"]  # all rows of the first call were measured again
    assert earlier["command"].endswith("--methods box_filled --add")
    assert set(earlier["rows"]) == {"box_filled/any/truth_boxes", "box_filled/any/jittered_boxes"}
    monkeypatch.setattr(bench, "SEED", 1)
    with pytest.raises(SystemExit) as stopped:
        add("--methods", "box_filled")
    assert stopped.value.code == 2
    assert read_json(tmp_path / "results.json") == joined


def test_a_second_call_measures_nothing_again(
    bench: ModuleType,
    mvtec: Path,
    work: Path,
    results: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []
    measure = bench.measure_samples

    def counted(method: Any, boxes_of: Any, samples: Sequence[Sample], *rest: Any) -> Any:
        measured.append([sample.path.name for sample in samples])
        return measure(method, boxes_of, samples, *rest)

    monkeypatch.setattr(bench, "measure_samples", counted)
    assert call(bench, mvtec, work, "--methods", *CHEAP) == results
    assert measured == []
    (work / "fold1" / "grabcut-zoom-jittered_boxes.json").unlink()
    again = call(bench, mvtec, work, "--methods", *CHEAP)
    assert again["instances"] == results["instances"]
    tested = {i["image"] for i in results["instances"] if i["fold"] == 1}
    assert [set(names) for names in measured] == [tested]
    monkeypatch.setattr(bench, "JITTER", 0.2)  # what depends on it is stale
    part = call(bench, mvtec, work, "--methods", "box_filled", "--folds", "0")
    assert len(measured) == 3
    assert {i["fold"] for i in part["instances"]} == {0}


def test_detector_boxes(
    bench: ModuleType, mvtec: Path, work: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    """The best box of the right class from IoU 0.5 on; without one the instance is missed."""
    dataset = Dataset(work / "dataset")
    given = {
        ("scratch__000.png", 0): [(1, (10, 12, 40, 24)), (1, (10, 12, 40, 30)), (2, None)],
        ("scratch__001.png", 0): [(2, None)],  # another class
        ("stain__000.png", 1): [(2, (50, 40, 70, 59))],  # an IoU of 0.475
        ("stain__001.png", 0): [(2, None)],
    }
    boxes = {
        (f"{cls}__{number:03}.png", index): instance[0]
        for cls in ("scratch", "stain")
        for number, image in enumerate([i for name, i in IMAGES if name == cls])
        for index, instance in enumerate(image)
    }
    for fold in range(2):
        images, entries = [], []
        for new_id, sample in enumerate(dataset.split("test", fold), start=70):
            name = sample.path.name
            images.append({"id": new_id, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for key, found in given.items():
                for category, box in found if key[0] == name else ():
                    x1, y1, x2, y2 = box or boxes[key]
                    bbox = [x1, y1, x2 - x1, y2 - y1]
                    entries.append(
                        {"image_id": new_id, "category_id": category, "bbox": bbox, "score": 0.5}
                    )
        write_predictions(tmp_path / f"fold{fold}", entries, images, dataset.classes)
    options = ["--methods", "box_filled", "--detections", str(tmp_path)]
    found = call(bench, mvtec, work, *options)
    row = found["summary"]["box_filled/any/detector_boxes"]
    ious = [i["iou"]["box_filled/any/detector_boxes"] for i in found["instances"]]
    # 30 x 18 of the box, less its hole, over the whole box less its hole, and the hole
    assert ious == pytest.approx([(540 - 60) / 600, 0, 0, 0, 0.75], abs=1e-4)
    assert (row["instances"], row["missed"]) == (5, 3)
    assert row["mean_iou"] == pytest.approx((0.8 + 0.75) / 5)
    write_predictions(tmp_path / "fold0", [], [], dataset.classes)
    with pytest.raises(SystemExit) as stopped:  # the kept figures are of other boxes
        call(bench, mvtec, work, *options)
    assert stopped.value.code == 2


def test_detections_of_other_classes(bench: ModuleType, tmp_path: Path) -> None:
    write_predictions(tmp_path, [], [], ["stain", "scratch"])
    with pytest.raises(UserError, match=r"expected the classes scratch, stain, found stain, scr"):
        bench.detector_boxes(tmp_path, ("scratch", "stain"))


def test_jittered_boxes_move_each_side_by_up_to_a_tenth(bench: ModuleType) -> None:
    shifts = []
    for image_id in range(1, 40):
        annotation = {
            "bbox": [20, 30, 40, 10],
            "category_id": 1,
            "segmentation": encode_rle(filled((20, 30, 60, 40), HEIGHT, WIDTH)),
        }
        sample = Sample(image_id, Path(), WIDTH, HEIGHT, (annotation,))
        boxes = bench.jittered_boxes(sample, 0)
        assert np.array_equal(boxes, bench.jittered_boxes(sample, 0))
        shifts.append((boxes - [20, 30, 60, 40]) / [4, 1, 4, 1])
    largest = np.abs(np.concatenate(shifts)).max(axis=0)
    assert ((largest > 0.9) & (largest <= 1)).all()
    assert len({shift.tobytes() for shift in shifts}) == 39


def test_grabcut_finds_a_bright_rectangle_in_a_loose_box(bench: ModuleType) -> None:
    image = draw([("stain", (30, 20, 60, 50))], HEIGHT, WIDTH)
    true = filled((30, 20, 60, 50), HEIGHT, WIDTH)
    for zoom in (0.0, 1.5):
        grabcut = bench.methods.grabcut(zoom)
        mask, quality = grabcut(image, np.array([26, 16, 65, 54], float))
        assert quality is None
        assert np.count_nonzero(mask ^ true) < 0.02 * true.sum()
        again, _ = grabcut(image, np.array([26, 16, 65, 54], float))
        assert np.array_equal(again, mask)


def test_grabcut_without_background_or_without_box(bench: ModuleType) -> None:
    image = draw([], HEIGHT, WIDTH)
    grabcut = bench.methods.grabcut(1.5)
    assert grabcut(image, np.array([0, 0, WIDTH, HEIGHT], float))[0].all()
    assert not grabcut(image, np.array([10.1, 10, 10.2, 30], float))[0].any()


def test_finetuned_models_are_trained_once_for_each_fold_and_view(
    bench: ModuleType, mvtec: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real training, in this process: an interpreter takes seconds to start."""
    calls: list[list[str]] = []
    in_a_process = subprocess.run

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[:3] != [sys.executable, "-m", "pipeline"]:  # git, for the record
            return in_a_process(command, **options)
        calls.append(command[3:])
        cli.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    options = {"model": "sam-lite", "epochs": 1, "repeats": 1, "offline": True, "device": "cpu"}
    monkeypatch.setattr(bench, "FINETUNED", {"sam_lite_finetuned": options})
    monkeypatch.setattr(subprocess, "run", in_this_process)
    asked = ["--methods", "sam_lite_finetuned", "--folds", "1"]
    summary = call(bench, mvtec, work, *asked)["summary"]
    assert [Path(command[2]).stem for command in calls] == [
        "sam_lite_finetuned-whole",
        "sam_lite_finetuned-zoom",
    ]
    for row in summary.values():
        (seconds,) = row["train_seconds_per_fold"]
        assert seconds > 0 and row["quality"]["mean_absolute_error"] > 0
    out = work / "fold1" / "sam_lite_finetuned-zoom"
    record = read_json(out / "run.json")
    assert record["command"] == "finetune-sam"
    assert call(bench, mvtec, work, *asked)["summary"] == summary
    assert len(calls) == 2
    write_json(out / "run.json", {**record, "signature": "of other options"})
    call(bench, mvtec, work, *asked)
    assert len(calls) == 3 and calls[2][-1] == "--force"


def test_a_failed_training_names_its_log(
    bench: ModuleType, mvtec: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = bench.converted(mvtec / "transistor", work / "dataset")
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    model = bench.Bench(dataset, tmp_path, None), "sam_lite_finetuned", "zoom", 0
    with pytest.raises(UserError, match=r"sam_lite_finetuned-zoom\.log: expected finetune-sam"):
        bench.common.run_stage((bench.FINETUNE, bench.training(*model)), 1)


def test_bad_input_exits_with_2(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--mvtec-root", str(tmp_path), "--work", str(tmp_path / "work")])
    assert stopped.value.code == 2
    assert "transistor" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--mvtec-root", str(tmp_path), "--work", str(tmp_path / "work"), "--jobs", "0"])
    assert "run.py: --jobs: expected at least 1, found 0" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
