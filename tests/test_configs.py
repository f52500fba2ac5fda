"""The configurations that ship: each runs by the command in its first line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, config, record
from pipeline.stages import run as run_stage

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def parse(path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The configuration that the command in the file's first line results in."""
    marker, program, *argv = shlex.split(path.read_text(encoding="utf-8").splitlines()[0])
    assert (marker, program) == ("#", "pipeline")
    assert f"configs/{path.name}" in argv
    seen: list[Any] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: type("Stage", (), {"run": seen.append})
    )
    cli.main([*argv, *more])
    (settings,) = seen
    assert cli.COMMANDS[argv[0]] is type(settings)
    return settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_first_line_is_the_command_that_runs_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = parse(path, monkeypatch)
    assert settings.out.parts[0] == "runs"  # which git ignores
    if isinstance(settings, config.RunConfig):
        assert run_stage.plan(settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_weights_that_are_named_are_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(path, monkeypatch)
    known = record.load_registry()
    if isinstance(settings, config.RunConfig):
        stages = [stage for _, stage in run_stage.plan(settings)]
        names = [s.model for s in stages if isinstance(s, config.FinetuneYoloConfig)]
        names += [s.model for s in stages if isinstance(s, config.FinetuneSamConfig)]
        assert names and set(names) <= set(known)


def test_no_two_configurations_share_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    outs = [parse(path, monkeypatch).out for path in CONFIGS]
    assert len(set(outs)) == len(outs)


def test_what_is_promised_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"demo", "transistor", "transistor-offline"} <= {path.stem for path in CONFIGS}
    transistor = parse(ROOT / "configs" / "transistor.yaml", monkeypatch)
    assert transistor.finetune_yolo["model"] == "yolov8s-worldv2"
    assert transistor.finetune_sam["model"] == "mobile-sam"


@pytest.mark.parametrize(
    "name", ["demo", "leather", "pretrain-transistor", "transistor-offline", "transistor-5fold"]
)
def test_nothing_is_downloaded_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(ROOT / "configs" / f"{name}.yaml", monkeypatch)
    for _, stage in run_stage.plan(settings):
        starts_from_scratch = getattr(stage, "pretrained", True) is False
        assert getattr(stage, "offline", True) or starts_from_scratch, stage.out
        if isinstance(stage, config.FinetuneYoloConfig | config.FinetuneSamConfig):
            assert record.load_registry()[stage.model].shipped, stage.model


def test_the_start_of_the_detector_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "configs" / "transistor-offline.yaml"
    settings = parse(path, monkeypatch, "--init", "yolov8n.pt")
    detector = dict(run_stage.plan(settings))["finetune-yolo"]
    assert detector.model_dump()["model"] == "yolov8n.pt"


def test_five_folds_differ_from_the_single_split_in_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = parse(ROOT / "configs" / "transistor-offline.yaml", monkeypatch)
    five = parse(ROOT / "configs" / "transistor-5fold.yaml", monkeypatch, "--init", "yolov8n.pt")
    other = {"out", "fold", "init", "convert"}
    same = (config.model_dump(exclude=other) for config in (one, five))
    assert next(same) == next(same)
    plan = run_stage.plan(five)
    detectors = [stage.model_dump() for name, stage in plan if name == "finetune-yolo"]
    assert [(d["fold"], d["model"]) for d in detectors] == [(k, "yolov8n.pt") for k in range(5)]


def test_the_study_has_its_five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbone, rotation, optimiser, weight decay, epochs and what is trained, as published."""
    rows = {
        "classifier-resnet18": ("resnet18", 0, "adam", 0, 50, ()),
        "classifier-resnet18-rotation": ("resnet18", 15, "adam", 0, 50, ()),
        "classifier-resnet34-layer4": ("resnet34", None, "adam", 0, 50, ("layer4", "fc")),
        "classifier-resnet50-adamw": ("resnet50", None, "adamw", 1e-4, 50, ()),
        "classifier-resnet50-rotation": ("resnet50", 15, "adamw", 1e-4, 100, ()),
    }
    for name, (model, rotation, optimizer, decay, epochs, unfreeze) in rows.items():
        c = parse(ROOT / "configs" / f"{name}.yaml", monkeypatch)
        found = (c.model, c.optimizer, c.weight_decay, c.epochs, c.unfreeze)
        assert found == (model, optimizer, decay, epochs, unfreeze)
        assert rotation in (None, c.rotation)
        assert (c.image_size, c.auto_augment) == (256, True)
        assert c.patience >= c.epochs  # the study trained to the end
