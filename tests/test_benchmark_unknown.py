"""benchmarks/unknown: small real trainings, each without one of the classes."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from rectangles import draw, filled

from benchmarks.unknown import run as benchmark
from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages import finetune_yolo

SIDE = 64
IN_A_PROCESS = subprocess.run
CLASSES = ("scratch", "stain")
SYSTEMS = ("detector", "detector_lowered", "anomaly", "both")
CONFIG: dict[str, Any] = {
    "fold": "all",
    "convert": {"source": "part", "folds": 2},
    "finetune_yolo": {
        "model": "yolo-world-n",
        "text": "learned",
        "image_size": SIDE,
        "epochs": 1,
        "batch": 4,
        "device": "cpu",
        "offline": True,
    },
    "finetune_sam": {"model": "sam-lite", "epochs": 1},
    "detect_anomaly": {"image_size": SIDE, "device": "cpu"},
    "segment": {"min_score": 0.0, "max_boxes": 2, "flip": False, "device": "cpu"},
    "evaluate": {"resamples": 10},
}


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a category: noise with a bright rectangle, and without."""
    root = tmp_path_factory.mktemp("mvtec")
    for k, cls in enumerate(CLASSES):
        for i in range(4):
            box = (8 + 3 * i, 10, 30 + 3 * i, 30 + 8 * k)
            write(root / "part" / "test" / cls / f"{i:03}.png", draw([(cls, box)], 48, SIDE, i))
            mask = filled(box, 48, SIDE) * np.uint8(255)
            write(root / "part" / "ground_truth" / cls / f"{i:03}_mask.png", mask)
    for i in range(10):
        write(root / "part" / "train" / "good" / f"{i:03}.png", draw([], 48, SIDE, 10 + i))
    return root


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The small configuration, and the stages that were run: in this process, for speed."""
    names: list[str] = []

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[0] != sys.executable:  # git, for the record
            return IN_A_PROCESS(command, **options)
        written = Path(command[command.index("--config") + 1])
        names.append(f"{command[3]} {written.parent.name}/{written.stem}")
        cli.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    def without_plots(overrides: dict[str, Any]) -> PromptTrainer:
        return PromptTrainer(overrides=overrides | {"plots": False})

    config = tmp_path_factory.mktemp("config") / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "CONFIG", config)
        patch.setattr(benchmark, "HERE", tmp_path_factory.mktemp("here"))
        patch.setattr(finetune_yolo, "PromptTrainer", without_plots)
        patch.setattr(subprocess, "run", in_this_process)
        yield names
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def call(mvtec: Path, work: Path, *options: str) -> None:
    benchmark.main(["--mvtec-root", str(mvtec), "--work", str(work), *options])


@pytest.fixture(scope="module")
def results(calls: list[str], mvtec: Path, work: Path) -> dict[str, Any]:
    call(mvtec, work, "--classes", "stain")
    first: dict[str, Any] = read_json(work / "results.json")
    return first


@pytest.mark.timeout(300)
def test_a_class_is_left_out_of_all_but_the_test(
    results: dict[str, Any], calls: list[str], work: Path
) -> None:
    assert calls[:4] == [
        "finetune-yolo stain/detector",
        "detect-anomaly stain/anomaly",
        "segment stain/predictions",
        "evaluate stain/evaluation",
    ]
    data = Dataset(work / "stain" / "dataset")
    labels = {part: [s.label for s in data.split(part)] for part in ("train", "val", "test")}
    assert [part for part in labels if 1 in labels[part]] == ["test"]
    model = torch.load(work / "stain" / "detector" / "detector.pt", weights_only=False)["model"]
    assert model.names == {0: "scratch"}

    # The row is what the evaluation's own table of images says, counted again.
    row = results["summary"]["stain"]
    with (work / "stain" / "evaluation" / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    unseen = [image["decision"] for image in images if image["class"] == "stain"]
    good = [image["decision"] for image in images if image["class"] == "good"]
    assert len(unseen) == 4 and row["good_images"] == len(good) == 2
    systems = row["systems"]
    assert tuple(systems) == SYSTEMS
    assert {its["images"] for its in systems.values()} == {4}
    assert systems["both"]["found"] == sum(decision != "good" for decision in unseen)
    by_boxes = sum(decision not in ("good", "unknown") for decision in unseen)
    assert systems["detector"]["found"] == by_boxes
    assert row["named_unknown"] == unseen.count("unknown")
    false_alarms = sum(decision != "good" for decision in good) / len(good)
    assert systems["both"]["false_alarm_rate"] == false_alarms
    assert systems["detector_lowered"]["false_alarm_rate"] == pytest.approx(false_alarms)
    assert row["training_minutes"] is not None
    assert results["command"].endswith("--mvtec-root datasets/mvtec_ad --classes stain")
    assert cv2.imread(str(work / "results.png")) is not None


@pytest.mark.timeout(300)
def test_rows_are_added_and_what_is_done_stays(
    results: dict[str, Any], calls: list[str], mvtec: Path, work: Path
) -> None:
    write_json(benchmark.HERE / "results.json", results)
    before = len(calls)
    call(mvtec, work, "--classes", "scratch", "--add")
    assert [name.split()[0] for name in calls[before:]] == [
        "finetune-yolo", "detect-anomaly", "segment", "evaluate",
    ]  # fmt: skip
    added = read_json(benchmark.HERE / "results.json")
    assert list(added["summary"]) == ["scratch", "stain"]
    assert added["summary"]["stain"] == results["summary"]["stain"]
    assert [run["rows"] for run in added["earlier"]] == [["stain"]]
    for name in SYSTEMS:
        each = [added["summary"][cls]["systems"][name] for cls in CLASSES]
        every = added["all"]["systems"][name]
        assert every["found"] == pytest.approx(sum(its["found"] for its in each))
        assert every["images"] == 8 and every["recall"] == pytest.approx(
            every["found"] / 8, abs=1e-4
        )
        rates = [its["false_alarm_rate"] for its in each]
        assert every["false_alarm_rate"] == pytest.approx(sum(rates) / 2)

    before = len(calls)
    call(mvtec, work)  # all of them, which are there
    assert len(calls) == before
    again = read_json(benchmark.HERE / "results.json")
    assert again["summary"] == added["summary"] and again["all"] == added["all"]
    assert again["earlier"] == []


def test_an_interval_that_none_and_all_have_too() -> None:
    """Wilson's, from the table in Newcombe, Statistics in Medicine 1998 (17), 857-872, and 10."""
    assert benchmark.part(81, 263)["interval"] == [0.2553, 0.3662]
    assert benchmark.part(15, 148)["interval"] == [0.0624, 0.1605]
    assert benchmark.part(0, 20)["interval"] == [0.0, 0.1611]
    assert benchmark.part(1, 29)["interval"] == [0.0061, 0.1718]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--classes", "dent"), "run.py: --classes: expected some of scratch, stain, found 'dent'"),
        (("--jobs", "0"), "run.py: --jobs: expected at least 1, found 0"),
    ],
)
def test_bad_input_is_one_line(
    calls: list[str],
    mvtec: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    problem: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(mvtec, tmp_path / "work", *options)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [problem]
    assert not (tmp_path / "work").exists()
