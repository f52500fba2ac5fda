"""What TensorBoard and MLflow have after a command, read back by themselves."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

from pipeline import cli
from pipeline.config import EvaluateConfig, RunConfig, build
from pipeline.data import loggers
from pipeline.data.dataset import Dataset
from pipeline.data.predictions import write_predictions
from pipeline.models import sam as sams
from pipeline.stages import run as run_stage
from tests.rectangles import Defects, write_dataset

TRAIN: tuple[Defects, ...] = (
    [("scratch", (10, 12, 40, 30))],
    [("stain", (50, 40, 90, 64))],
    [],
    [],
)
VAL: tuple[Defects, ...] = ([("scratch", (30, 20, 64, 40))], [])
TEST: tuple[Defects, ...] = ([("scratch", (5, 5, 25, 15))], [("stain", (60, 10, 80, 50))], [])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": TRAIN, "val": VAL, "test": TEST}
    return write_dataset(tmp_path_factory.mktemp("data") / "d", splits)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are named after their folder's path from the working folder."""
    monkeypatch.chdir(tmp_path)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW", "DO_NOT"))}
    yield
    for name in [name for name in os.environ if name.startswith(("MLFLOW", "DO_NOT"))]:
        del os.environ[name]
    os.environ.update(kept)


def run(*argv: object) -> None:
    cli.main([str(argument) for argument in argv])


FLAGS = ("--tensorboard", "tb", "--mlflow", "ml")


def in_tensorboard(name: str) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """Figures by name and step, and pictures (height, width, 3) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"tb/{name}", size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    figures = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    pictures = {}
    for tag in tags["images"]:
        (event,) = events.Images(tag)
        pictures[tag] = (event.height, event.width, 3)
    return figures, pictures


def in_mlflow(name: str) -> tuple[dict[str, dict[int, float]], set[str], Any]:
    """Figures by name and step, pictures by name, and the one run of this name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=Path("ml").resolve().as_uri())
    experiment = client.get_experiment_by_name("pipeline")
    (found,) = (
        r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == name
    )
    figures = {
        key: {m.step: m.value for m in client.get_metric_history(found.info.run_id, key)}
        for key in found.data.metrics
    }
    pictures = {Path(a.path).stem for a in client.list_artifacts(found.info.run_id, "pictures")}
    return figures, pictures, found


def pictures_in(folder: Path) -> dict[str, Any]:
    paths = [path for path in folder.iterdir() if path.suffix in (".png", ".jpg")]
    return {path.stem: cv2.imread(str(path)).shape for path in paths}


def check_epochs(name: str, columns: dict[str, str]) -> None:
    """Both have each figure of results.csv, by its name there."""
    with Path(name, "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown, pictures = in_tensorboard(name)
    stored, names, found = in_mlflow(name)
    for logged, column in columns.items():
        expected = {int(row["epoch"]): float(row[column]) for row in rows}
        assert shown[logged] == pytest.approx(expected, rel=1e-5)
        assert stored[logged] == pytest.approx(expected, rel=1e-5)
    assert pictures == pictures_in(Path(name)) and names == pictures.keys() and names
    assert found.info.status == "FINISHED"
    assert found.data.params["epochs"] == str(len(rows))


def predict(data: Path) -> None:
    """One true and one false box on the test images."""
    dataset = Dataset(data)
    samples = dataset.split("test")
    images = [
        {"id": s.image_id, "file_name": s.path.name, "width": s.width, "height": s.height}
        for s in samples
    ]
    results = [
        {"image_id": s.image_id, "category_id": 1, "bbox": [5, 5, 20, 10], "score": score}
        for s, score in zip(samples, (0.9, 0.6), strict=False)
    ]
    write_predictions(Path("predictions"), results, images, dataset.classes)


def test_an_evaluation(data: Path) -> None:
    predict(data)
    source = ("--data", data, "--predictions", "predictions", "--resamples", 0)
    run("evaluate", *source, "--out", "runs/evaluation", *FLAGS)
    values = json.loads(Path("runs/evaluation/metrics.json").read_text())
    shown, pictures = in_tensorboard("runs/evaluation")
    stored, names, found = in_mlflow("runs/evaluation")
    for name, value in {
        "box/map50": values["box"]["map50"],
        "box/ap50_per_class/scratch": 1.0,
        "good_images/false_alarms": values["good_images"]["false_alarms"],
        "image_decision/majority/accuracy": values["image_decision"]["majority"]["accuracy"],
    }.items():
        assert shown[name] == {0: pytest.approx(value)}
        assert stored[name] == {0: pytest.approx(value)}
    assert pictures == pictures_in(Path("runs/evaluation"))
    assert names == {"pr_curves", "confusion"}
    assert found.data.params["split"] == "test"


def test_a_classifier(data: Path) -> None:
    options = ("--epochs", 2, "--image-size", 32, "--no-pretrained", "--device", "cpu")
    run("finetune-classifier", "--data", data, "--out", "c", *options, *FLAGS)
    names = ("train_loss", "val_loss", "val_accuracy")
    check_epochs("c", {name: name for name in names})
    accuracies = json.loads(Path("c/accuracy.json").read_text())
    shown, _ = in_tensorboard("c")
    assert shown["test/accuracy"] == {0: pytest.approx(accuracies["test"]["accuracy"])}


def test_a_sam(data: Path) -> None:
    options = ("--model", sams.IMAGENET_START, "--epochs", 2, "--repeats", 1, "--device", "cpu")
    run("finetune-sam", "--data", data, "--out", "s", *options, *FLAGS)
    check_epochs("s", {"train_loss": "train_loss", "val_iou": "val_iou"})


def test_a_detector(data: Path) -> None:
    """Ultralytics' names, without the brackets that MLflow does not take."""
    options = ("--model", "yolov8n-worldv2.yaml", "--text", "learned", "--unseen-prompts")
    sizes = ("--epochs", 2, "--image-size", 64, "--batch", 4, "--device", "cpu")
    run("finetune-yolo", "--data", data, "--out", "y", *options, *sizes, *FLAGS)
    columns = ("train/box_loss", "val/cls_loss", "metrics/mAP50(B)", "lr/pg0")
    check_epochs("y", {name.replace("(B)", "B"): name for name in columns})


def test_a_detector_that_other_processes_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several GPUs Ultralytics starts processes that know no log; they leave a table."""
    from pipeline.models.yolo_trainer import DetectionTrainer, PromptTrainer

    monkeypatch.setattr(DetectionTrainer, "train", lambda self: None)
    trainer = PromptTrainer.__new__(PromptTrainer)
    trainer.ddp = True
    trainer.csv = tmp_path / "results.csv"
    trainer.csv.write_text("epoch,  metrics/mAP50(B)\n1,0.25\n2,0.5\n")
    with loggers.opened(settings("y")) as trainer.log:
        trainer.train()
    assert in_tensorboard("y")[0]["metrics/mAP50B"] == {1: 0.25, 2: 0.5}


def settings(out: str, **changes: Any) -> EvaluateConfig:
    flags = {"data": "d", "predictions": "p", "out": out, "tensorboard": "tb", "mlflow": "ml"}
    return build(EvaluateConfig, flags | changes)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_what_is_interrupted_says_so_and_goes_on(error: type[BaseException], status: str) -> None:
    with pytest.raises(error), loggers.opened(settings("r")) as log:
        log.metrics({"loss": 3.0, "iou": float("nan")}, 1)
        raise error
    figures, _, found = in_mlflow("r")
    assert (figures, found.info.status) == ({"loss": {1: 3.0}}, status)
    with loggers.opened(settings("r", seed=5), resumed=True) as log:
        log.metrics({"loss": 2.0}, 2)
    figures, _, found = in_mlflow("r")
    assert (figures, found.info.status) == ({"loss": {1: 3.0, 2: 2.0}}, "FINISHED")
    assert in_tensorboard("r")[0] == {"loss": {1: 3.0, 2: 2.0}}


def test_without_the_flags_nothing_is_written(data: Path) -> None:
    with loggers.opened(settings("r", tensorboard=None, mlflow=None)) as log:
        log.metrics({"loss": 3.0}, 1)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("option", ["tensorboard", "mlflow"])
def test_a_package_that_is_missing(
    option: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == option else find(name, *a)
    )
    with pytest.raises(SystemExit) as caught:
        run("finetune-classifier", "--data", data, "--out", "c", f"--{option}", "logs")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"--{option}: expected the package" in error and f"'pipeline[{option}]'" in error
    assert not list(Path().iterdir())


def test_a_folder_that_is_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("logs").touch()
    with pytest.raises(SystemExit) as caught:
        run("finetune-classifier", "--data", data, "--out", "c", "--tensorboard", "logs")
    assert caught.value.code == 2
    assert "--tensorboard: expected a folder, found the file logs" in capsys.readouterr().err


def test_a_run_hands_its_flags_to_the_stages_that_know_them() -> None:
    config = build(
        RunConfig,
        {
            "out": "runs",
            "convert": {"source": "x"},
            "tensorboard": "tb",
            "finetune_yolo": {"tensorboard": "other"},
            "finetune_sam": {},
        },
    )
    planned = {stage.out.name: stage for _, stage in run_stage.plan(config)}
    assert {
        name: str(stage.tensorboard)
        for name, stage in planned.items()
        if hasattr(stage, "tensorboard")
    } == {"detector": "other", "segmenter": "tb", "evaluation": "tb"}
