"""`pipeline run` with the real stages, on a few tiny images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.data.video import probe

ROOT = Path(__file__).parent.parent
TINY = [
    "synth.size=96",
    "synth.train_good=4",
    "synth.test_good=4",
    "synth.per_defect=4",
    "finetune_yolo.image_size=96",
    "finetune_yolo.epochs=1",
    "finetune_yolo.batch=8",
    "finetune_sam.epochs=1",
    "finetune_sam.repeats=1",
    "segment.max_boxes=2",
    "evaluate.resamples=10",
    "overlay.height=96",
    "overlay.seconds_per_image=0.1",
    "overlay.title_seconds=0",
]


@pytest.mark.timeout(180)
def test_run_from_nothing_to_a_report_and_then_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = "finetune_classifier.resnet18-scratch"
    tiny = [*TINY, f"{classifier}.epochs=1", f"{classifier}.image_size=32"]
    command = ["run", str(ROOT / "configs" / "demo.yaml"), "--out", str(tmp_path), "--set", *tiny]
    cli.main(command)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 6  # a fifth of each class: 2 of 8 good ones, 1 of 4 of each defect
    assert set(metrics["image_decision"]) == {"detector", "resnet18 (scratch)", "majority"}
    assert metrics["truth_boxes"]["mean_iou"] > 0.4  # the shipped sam-lite has seen such defects
    assert probe(tmp_path / "review.mp4").codec == "h264"
    assert "bent_lead__" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    capsys.readouterr()

    def written() -> dict[Path, int]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {p: p.stat().st_mtime_ns for p in files if p.parent != tmp_path}

    before = written()
    cli.main(command)
    assert written() == before
    assert capsys.readouterr().out.count("up to date") == 10


@pytest.mark.timeout(300)
def test_every_image_is_tested_once_in_two_folds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [*TINY, "convert.folds=2", "finetune_sam=null", "finetune_classifier={}"]
    config = str(ROOT / "configs" / "demo.yaml")
    cli.main(["run", config, "--fold", "all", "--out", str(tmp_path), "--set", *tiny])
    evaluation = tmp_path / "evaluation"
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert metrics["images"] == 24  # 8 good ones, 4 of each of 4 defects
    assert [fold["images"] for fold in metrics["folds"]] == [12, 12]
    assert sum(metrics["errors"].values()) >= len(metrics["missed"])
    images = json.loads((evaluation / "out_of_fold" / "images.json").read_text())["images"]
    assert sorted(image["id"] for image in images) == list(range(1, 25))
    assert (evaluation / "errors" / "index.html").is_file()
    assert probe(tmp_path / "review.mp4").frames == 24
    assert len(list((tmp_path / "report" / "images").iterdir())) == 24
    assert "fold 1: " in capsys.readouterr().out
