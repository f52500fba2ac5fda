"""benchmarks/detection: small real trainings, and figures that are those of the evaluation."""

from __future__ import annotations

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

from benchmarks import common
from benchmarks.detection import baselines, figures
from benchmarks.detection import run as benchmark
from pipeline import cli
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages import finetune_yolo

# Ultralytics is imported after our modules, which keep it to themselves.
from ultralytics.nn.tasks import DetectionModel  # isort: skip
from ultralytics.utils import DEFAULT_CFG_DICT  # isort: skip

SIDE = 64
CLASSIFIER = "efficientnet-lite0 (ImageNet)"
REAL_CONFIG, REAL_PRETRAIN = benchmark.CONFIG, benchmark.PRETRAIN
IN_A_PROCESS = subprocess.run
CLASSES = ("scratch", "stain")
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
    "finetune_sam": {
        "model": "sam-lite",
        "epochs": 1,
        "repeats": 1,
        "device": "cpu",
        "offline": True,
    },
    "finetune_classifier": {
        "small": {
            "model": "efficientnet-lite0",
            "unfreeze": ["classifier"],
            "epochs": 1,
            "image_size": 32,
            "device": "cpu",
            "offline": True,
        }
    },
    "detect_anomaly": {"image_size": SIDE, "device": "cpu"},
    "segment": {"min_score": 0.0, "max_boxes": 2, "flip": False, "device": "cpu"},
    "evaluate": {"resamples": 10},
}
PRETRAIN: dict[str, Any] = {
    "synth": {"train_good": 2, "test_good": 2, "per_defect": 2, "size": SIDE},
    "convert": {"fractions": [0.5, 0.3, 0.2]},
    "finetune_yolo": CONFIG["finetune_yolo"],
}


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a category: noise with a bright rectangle, and without."""
    root = tmp_path_factory.mktemp("mvtec")
    rng = np.random.default_rng(0)
    for cls in CLASSES:
        for i in range(4):
            x, y, width, height = rng.integers((4, 4, 12, 10), (34, 26, 24, 16)).tolist()
            box = (x, y, x + width, y + height)
            write(root / "part" / "test" / cls / f"{i:03}.png", draw([(cls, box)], 48, SIDE, i))
            mask = filled(box, 48, SIDE) * np.uint8(255)
            write(root / "part" / "ground_truth" / cls / f"{i:03}_mask.png", mask)
    for i in range(6):
        write(root / "part" / "train" / "good" / f"{i:03}.png", draw([], 48, SIDE, 10 + i))
    return root


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain YOLOv8n for COCO's classes, with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "yolov8n.pt"
    model = DetectionModel("yolov8n.yaml", nc=80, verbose=False)
    torch.save({"model": model, "train_args": {}}, path)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The small configuration, and the stages that were run: in this process, for speed."""
    names: list[str] = []

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[0] != sys.executable:  # git, for the record
            return IN_A_PROCESS(command, **options)
        if command[1] == "-m":
            name, arguments, main = command[3], command[3:], cli.main
        else:
            name, arguments, main = command[2], command[2:], baselines.main
        written = Path(arguments[arguments.index("--config") + 1])
        names.append(f"{name} {written.parent.name}/{written.stem}")
        main(arguments)
        return subprocess.CompletedProcess(command, 0)

    def without_plots(overrides: dict[str, Any]) -> PromptTrainer:
        return PromptTrainer(overrides=overrides | {"plots": False})

    folder = tmp_path_factory.mktemp("config")
    config, pretrain = folder / "small.yaml", folder / "pretrain.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    pretrain.write_text(yaml.safe_dump(PRETRAIN))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "CONFIG", config)
        patch.setattr(benchmark, "PRETRAIN", pretrain)
        patch.setattr(finetune_yolo, "PromptTrainer", without_plots)
        patch.setattr(subprocess, "run", in_this_process)
        yield names
    torch.set_num_threads(threads)


def call(mvtec: Path, work: Path, *options: str) -> dict[str, Any]:
    """Run a part of the benchmark; returns its results."""
    benchmark.main(["--mvtec-root", str(mvtec), "--work", str(work), *options])
    return read_json(work / "results.json")


@pytest.fixture(scope="module")
def results(calls: list[str], mvtec: Path, work: Path, checkpoint: Path) -> dict[str, Any]:
    """All methods on both folds."""
    return call(mvtec, work, "--checkpoint", str(checkpoint), "--methods", *benchmark.METHODS)


@pytest.mark.timeout(300)
def test_every_row_has_the_figures_of_its_evaluation(results: dict[str, Any], work: Path) -> None:
    assert list(results["summary"]) == list(benchmark.METHODS)
    for method, row in results["summary"].items():
        metrics = read_json(work / method / "evaluation" / "metrics.json")
        assert (metrics["fold"], row["images"], row["instances"]) == ("all", 14, 8)
        assert row["map50"] == metrics["box"]["map50"]
        assert row["ap50_per_class"].keys() == set(CLASSES)
        alarms = metrics["good_images"]["false_alarms_per_image"]
        assert row["false_alarms_per_good_image"] == alarms
        decisions = row["image_decision"]
        together = [] if method in baselines.BASELINES else ["detector_with_anomaly"]
        assert [*decisions] == ["detector", *together, CLASSIFIER, "majority"]
        assert all(np.sum(scores["confusion"]) == 14 for scores in decisions.values())
        assert row["intervals"]["map50"] == metrics["intervals"]["box.map50"]
        assert "false_alarms_per_good_image" in row["intervals"]
        assert not any("mask" in key or "box." in key for key in row["intervals"])
        assert row["errors"] == metrics["errors"]
        decided = decisions[together[0] if together else "detector"]
        assert row["image_accuracy"] == decided["accuracy"]
        assert row["balanced_accuracy"] == decided["balanced_accuracy"]
        assert len(row["minutes"]) == len(row["map50_per_fold"]) == 2
        assert all(minutes is not None for minutes in row["minutes"])
        assert min(row["minutes"]) <= row["minutes_per_fold"] <= max(row["minutes"])
    assert {"date", "command", "machine", "versions"} <= results.keys()
    assert results["checkpoint"]["name"] == "yolov8n.pt"
    assert str(work) not in results["command"]
    assert cv2.imread(str(work / "results.png")) is not None


@pytest.mark.timeout(300)
def test_what_rows_have_in_common_is_made_once(
    results: dict[str, Any], calls: list[str], work: Path
) -> None:
    trained = [c for c in calls[:25] if not c.startswith(("evaluate", "segment"))]
    expected = {
        f"{name} fold{fold}/{out}"
        for fold in range(2)
        for name, out in (
            ("finetune-yolo", "detector"),  # of two methods
            ("yolov8n_default", "detector"),
            ("yolo_world_default", "detector"),
            ("finetune-classifier", "small"),
        )
    }
    expected |= {f"finetune-sam segmenters/fold{fold}" for fold in range(2)}
    expected |= {f"detect-anomaly anomaly/fold{fold}" for fold in range(2)}
    rendered = {"synth": "mvtec", "convert": "dataset", "finetune-yolo": "detector"}
    expected |= {f"{name} pretrained/{out}" for name, out in rendered.items()}
    assert set(trained) == expected and len(trained) == 17
    decisions = [row["image_decision"] for row in results["summary"].values()]
    assert all(d[CLASSIFIER] == decisions[0][CLASSIFIER] for d in decisions)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["yolov8n_default", "yolo_world_default"])
def test_baselines_are_trained_by_ultralytics_defaults(
    results: dict[str, Any], work: Path, method: str
) -> None:
    told = {
        "task", "mode", "model", "data", "epochs", "imgsz", "seed", "device", "project", "name",
        "plots", "save_dir",
    }  # fmt: skip
    out = work / method / "fold1" / "detector"
    used = yaml.safe_load((out / "training" / "args.yaml").read_text())
    assert {key for key in used if used[key] != DEFAULT_CFG_DICT.get(key)} <= told
    assert (used["epochs"], used["imgsz"]) == (1, SIDE)
    model = torch.load(out / "detector.pt", weights_only=False)["model"]
    expected = {"yolov8n_default": "DetectionModel", "yolo_world_default": "WorldModel"}
    assert type(model).__name__ == expected[method]
    assert tuple(model.names.values()) == CLASSES


@pytest.mark.timeout(300)
def test_boxes_of_baselines_are_what_segment_shows_to_sam(
    results: dict[str, Any], work: Path, tmp_path: Path, sam: str
) -> None:
    out = work / "yolo_world_default" / "fold0"
    cli.main([
        "segment", "--source", str(work / "dataset"), "--fold", "0", "--splits", "val",
        "--boxes", str(out / "detector" / "detector.pt"), "--sam", sam, "--no-flip",
        "--scales", "1", "--no-fit-boxes", "--no-rescore", "--min-score", "0", "--max-boxes", "2",
        "--device", "cpu", "--out", str(tmp_path / "x"),
    ])  # fmt: skip
    theirs = read_json(tmp_path / "x" / "predictions.json")
    shown = [sample.image_id for sample in Dataset(work / "dataset").split("val", 0)]
    assert sorted({entry["image_id"] for entry in theirs}) == sorted(shown)
    for entry in theirs:
        del entry["segmentation"], entry["quality"]
    ours = read_json(out / "predictions" / "predictions.json")
    assert [entry for entry in ours if entry["image_id"] in shown] == theirs


@pytest.mark.timeout(300)
def test_a_second_call_does_what_is_missing(
    results: dict[str, Any], calls: list[str], mvtec: Path, work: Path, checkpoint: Path
) -> None:
    asked = ["--checkpoint", str(checkpoint), "--methods", "yolov8n_default"]
    before = len(calls)
    again = call(mvtec, work, *asked)
    assert len(calls) == before
    assert again["summary"]["yolov8n_default"] == results["summary"]["yolov8n_default"]
    trained = work / "yolov8n_default" / "fold1" / "detector" / "run.json"
    content = read_json(trained)
    write_json(trained, {**content, "signature": "of other options"})
    call(mvtec, work, *asked)
    assert calls[before] == "yolov8n_default fold1/detector"
    assert read_json(trained) == content
    # One fold by itself: its detector is there.
    before = len(calls)
    (key,) = call(mvtec, work, *asked, "--folds", "1")["summary"]
    assert key == "yolov8n_default/fold1"
    assert calls[before:] == ["evaluate fold1/evaluation"]
    tested = len(Dataset(work / "dataset").split("test", 1))
    evaluation = work / "yolov8n_default" / "fold1" / "evaluation"
    assert read_json(evaluation / "metrics.json")["images"] == tested


@pytest.fixture
def real_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the small one."""
    monkeypatch.setattr(benchmark, "CONFIG", REAL_CONFIG)
    monkeypatch.setattr(benchmark, "PRETRAIN", REAL_PRETRAIN)


def asked(*options: str) -> Any:
    return benchmark.parser().parse_args(["--mvtec-root", "mvtec", "--work", "work", *options])


@pytest.mark.usefixtures("real_config")
def test_ablations_and_shots_change_ours_alone_where_they_say() -> None:
    arguments = asked("--checkpoint", "yolov8n.pt", "--ablation", "--few-shot")
    chosen = benchmark.methods(arguments)
    assert chosen == [*benchmark.METHODS, *benchmark.ABLATION, *benchmark.FEW_SHOT]
    assert {"few_shot/1", "few_shot/2", "few_shot/4", "few_shot/8"} <= set(chosen)

    def flat(method: str) -> dict[str, Any]:
        """The options of the first fold's stages, by the dotted key, without paths of results."""
        stages = benchmark.planned(arguments, method, "all").stages
        options = {
            f"{name.replace('-', '_')}.{key}": value
            for name, stage in reversed(stages)
            for key, value in stage.model_dump().items()
        }
        results = (".out", ".boxes", ".predictions", ".truth_boxes", ".evaluation", ".video")
        paths = (*results, "finetune_yolo.model")
        return {key: value for key, value in options.items() if not key.endswith(paths)}

    ours = flat("ours")
    for method, changes in benchmark.CHANGES.items():
        found = flat(method)
        assert {key: found[key] for key in found if found[key] != ours[key]} == changes


@pytest.mark.usefixtures("real_config")
def test_classifiers_can_be_left_out() -> None:
    arguments = asked("--checkpoint", "yolov8n.pt", "--no-classifiers")
    row = benchmark.planned(arguments, "ours", "all")
    assert row.of("finetune-yolo") and not row.of("finetune-classifier")
    (evaluated,) = row.of("evaluate")
    assert evaluated.model_dump()["classifiers"] == ()
    assert benchmark.command(arguments).endswith("--no-classifiers")


@pytest.mark.usefixtures("real_config")
def test_where_detectors_start() -> None:
    arguments = asked("--checkpoint", "yolov8n.pt")

    def start(method: str) -> Any:
        (found,) = {s.model_dump()["model"] for s in row(method).of("finetune-yolo")}
        return found

    def row(method: str) -> benchmark.Row:
        return benchmark.planned(arguments, method, "all")

    *_, (_, pretrained) = benchmark.pretraining(arguments)
    assert pretrained.model_dump()["model"] == "yolov8n.pt"
    detector = str(pretrained.out / "detector.pt")
    assert start("ours") == start("few_shot/1") == start("ablation/no_pasting") == detector
    assert start(benchmark.NOT_PRETRAINED) == start("yolov8n_default") == "yolov8n.pt"
    assert start(benchmark.SHIPPED) == "yolo-world-n"
    # What a change leaves as it is, is not trained again.
    same = row("ablation/boxes_not_fitted").of("finetune-yolo")
    assert [stage.out for stage in same] == [stage.out for stage in row("ours").of("finetune-yolo")]


def test_methods_are_measured_in_one_order() -> None:
    assert benchmark.methods(asked()) == list(benchmark.METHODS)
    chosen = benchmark.methods(asked("--methods", "few_shot/2", "ours", "--ablation"))
    assert chosen == ["ours", *benchmark.ABLATION, "few_shot/2"]


@pytest.mark.usefixtures("real_config")
def test_bad_input_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"

    def lines(*options: str) -> list[str]:
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(["--mvtec-root", str(tmp_path), "--work", str(work), *options])
        assert stopped.value.code == 2 and not work.exists()
        return capsys.readouterr().err.splitlines()

    assert lines("--methods", "ours", "--jobs", "0", "--folds", "5") == [
        "run.py: --jobs: expected at least 1, found 0",
        "run.py: --folds: expected 0 to 4, found 5",
        "run.py: --checkpoint: required for ours, not given",
    ]
    (problem,) = lines("--checkpoint", str(tmp_path / "none.pt"))
    assert problem == f"run.py: --checkpoint: expected a file, found none at {tmp_path / 'none.pt'}"
    (problem,) = lines("--methods", benchmark.SHIPPED)
    assert str(tmp_path / "transistor") in problem


def test_a_script_of_its_own_reports_bad_input(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("epochs: none\n")
    script = Path(baselines.__file__)
    done = IN_A_PROCESS(
        [sys.executable, str(script), "yolov8n_default", "--config", "bad.yaml", "--force"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "baselines.py: bad.yaml: epochs: expected a whole number, found 'none'" in done.stderr


def test_figures_without_truth_or_intervals(tmp_path: Path) -> None:
    """What the data do not define is left out of the plot, and a dash in the table."""
    decision = {"accuracy": 1.0, "balanced_accuracy": None, "macro_f1": None}
    metrics = {
        "images": 3,
        "instances": 0,
        "folds": None,
        "box": {"map50": None, "map50_95": None, "ap50_per_class": {"stain": None}},
        "recall_at_false_alarms": {"recall": 0.5},
        "good_images": {"false_alarms_per_image": 0.25},
        "errors": {},
        "image_decision": {"detector": decision, "majority": decision},
        "intervals": {"box.map50": [0, 1], "mask.map50": [0, 1], "box.ap_per_class.stain": [0, 1]},
    }
    row = figures.summarise(
        metrics,
        [
            [{"seconds": 90.0, "threads": 2}, {"seconds": 30.0, "threads": 2}],
            [{"seconds": 60.0, "threads": 1}, {"seconds": None, "threads": 1}],
        ],
    )
    assert (row["minutes"], row["minutes_per_fold"]) == ([2.0, None], 2.0)
    assert row["threads"] == [2, 1]
    assert row["intervals"] == {"map50": [0, 1]}
    figures.plot(tmp_path / "results.png", {"ours": row})
    assert cv2.imread(str(tmp_path / "results.png")) is not None
    figures.show({"ours": row})


def test_few_shot_curve_is_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the images, not of the rows; without such rows there is none."""
    drawn: list[Any] = []
    monkeypatch.setattr(common, "save_plot", lambda figure, path: drawn.append(figure))
    rows = {
        "few_shot/8": {"map50": 0.9, "map50_95": 0.6, "intervals": {"map50": (0.8, 1.0)}},
        "ours": {"map50": 0.95, "map50_95": 0.7, "intervals": {}},
        "few_shot/1": {"map50": 0.4, "map50_95": 0.2, "intervals": {}},
    }
    figures.plot_few_shot(tmp_path / "few_shot.png", {"ours": rows["ours"]})
    assert not drawn
    figures.plot_few_shot(tmp_path / "few_shot.png", rows)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert lines == {"mAP50": [[1, 0.4], [8, 0.9]], "mAP50-95": [[1, 0.2], [8, 0.6]]}
