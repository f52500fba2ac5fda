"""The commands printed in the README work, in the order they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline import cli, config
from pipeline.data.synth import render_dataset
from pipeline.stages import run as run_stage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (pipeline .*?)(?:\s+#.*)?$", README, re.MULTILINE)

# What a test on a small machine changes: starting points that need no network, and tiny sizes.
OFFLINE = {"yolov8s-worldv2": "yolov8n-worldv2.yaml", "mobile-sam": "sam-lite-imagenet"}
TINY = {
    "finetune-yolo": "--epochs 1 --image-size 64 --batch 4 --text learned",
    "finetune-sam": "--epochs 1 --repeats 1 --train decoder --device cpu",
    "finetune-classifier": "--epochs 1 --image-size 64 --device cpu",
    "segment": "--max-boxes 2 --splits val test --device cpu",
    "evaluate": "--resamples 10",
    "overlay": "--height 96",
}


def test_readme_prints_every_command() -> None:
    printed = {shlex.split(line)[1] for line in COMMANDS}
    assert set(TINY) | {"convert", "measure", "run"} <= printed
    table = set(re.findall(r"^\| `pipeline ([a-z-]+)`", README, re.MULTILINE))
    assert table == set(cli.COMMANDS)


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("pipeline run")])
def test_run_commands_are_complete(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    planned: list[config.RunConfig] = []
    monkeypatch.setattr(run_stage, "run", planned.append)
    cli.main(shlex.split(line)[1:])
    assert run_stage.plan(planned[0])


@pytest.mark.timeout(180)
def test_stage_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    source = tmp_path / "datasets" / "mvtec_ad" / "transistor"
    render_dataset(source, train_good=4, test_good=3, per_defect=3, size=96, seed=0)
    for line in COMMANDS:
        _, command, *arguments = shlex.split(line)
        if command in {"run", "weights"}:
            continue
        arguments = [OFFLINE.get(argument, argument) for argument in arguments]
        cli.main([command, *arguments, *shlex.split(TINY.get(command, ""))])
    assert (tmp_path / "runs" / "evaluation" / "report.md").is_file()
    assert (tmp_path / "runs" / "review.mp4").stat().st_size > 1000
