"""benchmarks/study: rows are those of `pipeline evaluate`, or the figures of the runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from rectangles import draw, filled

from benchmarks.study import run as benchmark
from pipeline import cli
from pipeline.config import DetectAnomalyConfig, FinetuneClassifierConfig
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json, write_text
from pipeline.data.predictions import write_predictions

IN_A_PROCESS = subprocess.run
SIDE = 64
KEYS = {
    "method", "needs", "protocol", "images", "defective", "image_auroc", "average_precision",
    "recall", "false_alarm_rate", "pixel_auroc", "pro", "pixel_iou", "accuracy",
    "balanced_accuracy", "macro_f1", "map50", "mask_iou", "training_seconds",
    "inference_seconds_per_image", "intervals", "gain", "per_fold",
}  # fmt: skip


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a category: noise with a bright rectangle, and without."""
    root = tmp_path_factory.mktemp("mvtec") / "transistor"
    for i in range(6):
        box = (10 + 4 * i, 12, 40 + 3 * i, 44)
        write(root / "test" / "stain" / f"{i:03}.png", draw([("stain", box)], SIDE, SIDE, i))
        mask = filled(box, SIDE, SIDE) * np.uint8(255)
        write(root / "ground_truth" / "stain" / f"{i:03}_mask.png", mask)
    for part, count in (("train", 8), ("test", 4)):
        for i in range(count):
            image = draw([], SIDE, SIDE, 10 * count + i)
            write(root / part / "good" / f"{i:03}.png", image)
    return root.parent


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark's own folder, for this test."""
    folder = tmp_path / "here"
    write_text(
        folder / "README.md", f"before\n\n{benchmark.BEGIN}\nold\n{benchmark.END}\n\nafter\n"
    )
    monkeypatch.setattr(benchmark, "HERE", folder)
    monkeypatch.setattr(benchmark, "README", folder / "README.md")
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, here: Path) -> list[str]:
    """The stages that were run: in this process and on small images, for speed."""
    names: list[str] = []

    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[0] != sys.executable:  # git, for the record
            return IN_A_PROCESS(command, **options)
        written = Path(command[command.index("--config") + 1])
        names.append(f"{written.parent.name}/{written.stem}")
        cli.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", in_this_process)
    monkeypatch.setattr(benchmark, "FOLDS", 2)
    small = {"image_size": 64}
    options: dict[str, dict[str, Any]] = {"detect-anomaly": small, "finetune-head": small}
    options["finetune-classifier"] = {**small, "epochs": 1}
    monkeypatch.setattr(benchmark, "OPTIONS", options | {"evaluate": {"resamples": 20}})
    return names


def call(mvtec: Path, work: Path, *options: str) -> None:
    benchmark.main(["--mvtec-root", str(mvtec), "--work", str(work), *options])


def test_rows(mvtec: Path, tmp_path: Path, here: Path, calls: list[str]) -> None:
    work = tmp_path / "work"
    methods = ["--methods", "cosine", "resnet18-from-scratch"]
    call(mvtec, work, *methods)
    assert calls == [
        "fold0/cosine", "fold1/cosine", "work/comparison-folds",
        "study/resnet18-from-scratch", "study/cosine", "work/comparison-study", "mvtec/cosine",
    ]  # fmt: skip
    results = read_json(work / "results.json")
    rows = {(row["protocol"], row["method"]): row for row in results["rows"]}
    assert list(rows) == [
        ("folds", "cosine"), ("study", "resnet18-from-scratch"), ("study", "cosine"),
        ("mvtec", "cosine"),
    ]  # fmt: skip
    assert all(row.keys() == KEYS for row in rows.values())
    figures = read_json(work / "mvtec" / "cosine" / "metrics.json")
    row = rows["mvtec", "cosine"]
    assert (row["images"], row["defective"]) == (10, 6)
    assert row["image_auroc"] == figures["image"]["auroc"]
    pixel = figures["pixel"]
    assert (row["pixel_auroc"], row["pro"]) == (pixel["auroc"], pixel["pro"])
    assert row["training_seconds"] == figures["seconds"]["training"]
    assert row["pixel_iou"] is None  # no validation split
    row = rows["folds", "cosine"]
    assert (row["images"], row["defective"]) == (18, 6)
    of_folds = [read_json(work / f"fold{k}" / "cosine" / "metrics.json") for k in (0, 1)]
    areas = [its["pixel"]["auroc"] for its in of_folds]
    assert row["pixel_auroc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert [its["pixel_auroc"] for its in row["per_fold"]] == areas
    assert row["accuracy"] is None
    row = rows["study", "resnet18-from-scratch"]
    found = read_json(work / "study" / "resnet18-from-scratch" / "accuracy.json")["test"]
    assert row["needs"] == "labels"
    assert row["accuracy"] == pytest.approx(found["accuracy"], abs=1e-6)
    assert row["balanced_accuracy"] == pytest.approx(found["balanced_accuracy"], abs=1e-6)
    assert row["training_seconds"] > 0 and row["inference_seconds_per_image"] > 0
    assert results["command"].endswith(f"--category transistor {' '.join(methods)}")
    assert "old" in (here / "README.md").read_text()  # a part is not for readers
    calls.clear()
    call(mvtec, work, *methods)  # all is there
    assert calls == []
    assert read_json(work / "results.json")["rows"] == results["rows"]


def test_rows_are_added_and_the_readme_follows(
    mvtec: Path, tmp_path: Path, here: Path, calls: list[str]
) -> None:
    work = tmp_path / "work"
    call(mvtec, work, "--methods", "padim", "--protocols", "mvtec", "--add")
    first = read_json(here / "results.json")
    call(mvtec, work, "--methods", "cosine", "--protocols", "mvtec", "--add")
    results = read_json(here / "results.json")
    assert [row["method"] for row in results["rows"]] == ["cosine", "padim"]
    assert results["rows"][1] == first["rows"][0]
    (earlier,) = results["earlier"]
    assert (earlier["command"], earlier["rows"]) == (first["command"], ["mvtec/padim"])
    text = (here / "README.md").read_text()
    assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "old" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("| padim")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["padim", "good images", f"{first['rows'][0]['image_auroc']:.3f}"]


def test_heads_gain_over_the_plain_one(mvtec: Path, tmp_path: Path, calls: list[str]) -> None:
    work = tmp_path / "work"
    methods = ["cosine", "head-plain", "head-balanced-weights"]
    call(mvtec, work, "--protocols", "study", "--methods", *methods)
    assert calls[-2:] == ["work/comparison-study", "work/comparison-study-heads"]
    plain, weighted, cosine = read_json(work / "results.json")["rows"]
    assert plain["gain"] == cosine["gain"] == {}
    for key in ("accuracy", "balanced_accuracy", "macro_f1"):
        its = weighted["gain"][key]
        assert its["value"] == pytest.approx(weighted[key] - plain[key], abs=2e-6)
        assert its["interval"][0] <= its["interval"][1]
    text = benchmark.markdown([plain, weighted, cosine])
    assert "63 test images, 8 of them defective, gain over head-plain:" in text
    assert text.count("| head-balanced-weights |") == 2 and text.count("| cosine |") == 1


def test_a_detector_that_is_there_already(mvtec: Path, tmp_path: Path, calls: list[str]) -> None:
    """Perfect predictions, whose record has no seconds: they are in files of another benchmark."""
    work, there = tmp_path / "work", tmp_path / "there"
    call(mvtec, work, "--methods", "cosine", "--protocols", "folds")
    data = Dataset(work / "dataset")
    for k, seconds in enumerate((100.0, 50.0)):
        folder = there / f"fold{k}" / "predictions"
        samples = [s for part in ("val", "test") for s in data.split(part, k)]
        results = [{**a, "score": 0.9} for s in samples for a in s.annotations]
        images = [
            {"id": s.image_id, "file_name": s.path.name, "width": s.width, "height": s.height}
            for s in samples
        ]
        write_predictions(folder, results, images, data.classes)
        write_json(folder / "run.json", {"command": "segment", "signature": str(k), "inputs": {}})
        options = {"fold": k, "boxes": str(there / f"fold{k}" / "detector" / "detector.pt")}
        options["sam"] = str(there / f"fold{k}" / "segmenter" / "sam.safetensors")
        write_text(folder / "config.yaml", yaml.safe_dump(options))
        for name, its in (("detector", seconds), ("segmenter", 20.0), ("predictions", 7.0)):
            write_json(there / f"fold{k}" / f"{name}.seconds.json", {"seconds": its, "threads": 1})
    calls.clear()
    predictions = str(there / "fold{fold}" / "predictions")
    options = ["--methods", "yolo-world-sam", "--protocols", "folds", "--predictions", predictions]
    call(mvtec, work, *options)
    assert calls == ["work/comparison-folds"]
    (row,) = read_json(work / "results.json")["rows"]
    assert (row["map50"], row["mask_iou"], row["image_auroc"], row["accuracy"]) == (1, 1, 1, 1)
    assert row["training_seconds"] == 95  # mean of 120 and 70
    images = [len(read_json(there / f"fold{k}/predictions/images.json")["images"]) for k in (0, 1)]
    assert row["inference_seconds_per_image"] == pytest.approx(
        (7 / images[0] + 7 / images[1]) / 2, abs=1e-4
    )


def test_what_is_planned() -> None:
    """Every row has a run; the classifiers have the options of the study's configurations."""
    place = benchmark.Place(Path("data"), 3, Path("out"))
    planned = {row.method: row.stages(place) for row in benchmark.rows()}
    methods = {
        stages[0][1].method
        for stages in planned.values()
        if isinstance(stages[0][1], DetectAnomalyConfig)
    }
    assert {"cosine", "mahalanobis", "padim", "patchcore"} <= methods
    for stages in planned.values():
        (*_, (_, last)) = stages
        assert last.fold == 3  # type: ignore[attr-defined]
    ((_, lite0),) = planned["efficientnet-lite0-as-resnet50-rotation"]
    ((_, resnet),) = planned["resnet50-rotation"]
    assert isinstance(lite0, FinetuneClassifierConfig)
    changed = {"model": "efficientnet-lite0", "offline": True}
    assert lite0 == resnet.model_copy(update=changed)
    assert (lite0.epochs, lite0.rotation, lite0.weight_decay) == (100, 15, 1e-4)
    detector = planned["yolo-world-sam"]
    assert [name for name, _ in detector] == [
        "finetune-yolo", "finetune-sam", "detect-anomaly", "segment",
    ]  # fmt: skip
    (_, segment) = detector[-1]
    assert segment.anomaly == detector[-2][1].out  # type: ignore[attr-defined]
    assert (str(segment.out), segment.boxes, segment.sam) == (  # type: ignore[attr-defined]
        "out/predictions", "out/detector/detector.pt", "out/segmenter/sam.safetensors",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "expected"),  # whatever is wrong with the empty folder
        (("--predictions", "p"), "--predictions: expected a path with {fold}, found p"),
        (("--jobs", "0"), "--jobs: expected at least 1, found 0"),
        (
            ("--methods", "resnet18", "--protocols", "mvtec"),
            "--protocols: expected one that --methods are measured by, found none",
        ),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(tmp_path, tmp_path / "work", *options)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: ") and expected in line
    assert not (here / "results.json").exists()


def test_the_results_that_are_kept_reach_what_is_published() -> None:
    results = read_json(benchmark.HERE / "results.json")
    rows = {(row["protocol"], row["method"]): row for row in results["rows"]}
    patchcore, padim = rows["mvtec", "patchcore"], rows["mvtec", "padim"]
    assert patchcore["image_auroc"] >= 0.99 and patchcore["pixel_auroc"] >= 0.97
    assert padim["image_auroc"] >= 0.95
    assert rows["mvtec", "cutpaste"]["image_auroc"] >= 0.9
    assert rows["study", "efficientnet-lite0-as-resnet18"]["accuracy"] > 0.905
    assert all(row.keys() == KEYS for row in rows.values())


def test_the_readme_shows_the_results_that_are_kept() -> None:
    text = benchmark.README.read_text(encoding="utf-8")
    shown = text.partition(benchmark.BEGIN)[2].partition(benchmark.END)[0]
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|")]
    rows = read_json(benchmark.HERE / "results.json")["rows"]
    assert {row["method"] for row in rows} <= {cells[0] for cells in lines}
    assert shown.strip() == benchmark.markdown(rows)
