"""`pipeline finetune-yolo`: bad input, and where the embeddings of prompts come from."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from spots import begin, config, write_dataset

from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError
from pipeline.models import text, yolo_world
from pipeline.stages import finetune_yolo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompts": {"scratch": "a"}}, "--prompts: expected a class of bright_spot, dark_spot, "),
        ({"device": "9"}, "--device: expected auto, cpu, mps or one of "),
        ({"model": "nothing.pt"}, "nothing.pt: expected a checkpoint file or a known name"),
        ({"data": "nowhere"}, "nowhere: expected a folder written by `pipeline convert`"),
        ({"fold": 7}, "instances_fold7_train.json: expected this split"),
        ({"text": "clip"}, "--text clip: expected the package clip-anytorch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_leaves_nothing_behind(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    problem: str,
) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(UserError) as raised:
        finetune_yolo.run(config(dataset, tmp_path / "out", **changes))
    assert problem in raised.value.problems[0]
    assert not (tmp_path / "out").exists()


def test_every_unknown_prompt_is_named(dataset: Path, tmp_path: Path) -> None:
    prompts = {"a": "1", "dark_spot": "2", "b": "3"}
    with pytest.raises(UserError) as raised:
        finetune_yolo.run(config(dataset, tmp_path, prompts=prompts))
    assert [problem.split("found ")[1] for problem in raised.value.problems] == ["'a'", "'b'"]


def test_without_any_defect_to_learn_there_is_no_training(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    train = data / "annotations" / "instances_train.json"
    write_json(train, {**read_json(train), "annotations": []})
    with pytest.raises(UserError, match=r"expected defects in the train split of .*found none"):
        finetune_yolo.run(config(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_clip_prompts_are_learned_and_it_says_why(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    begin(monkeypatch, config(dataset, tmp_path, text="auto"))
    reason = "expected the package clip-anytorch (pip install 'pipeline[clip]'), found none"
    kind = f"learned (not by CLIP: {reason})"
    assert f"prompts: {kind}\n" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "prompts.yaml").read_text())["embeddings"] == kind
    start = yolo_world.load_model(str(tmp_path / "weights" / "start.pt"))
    assert isinstance(start.txt_feats, torch.nn.Parameter)


def test_with_clip_prompts_are_its_embeddings(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = torch.randn(2, 512)
    asked = []

    def clip(texts: list[str], *, offline: bool) -> torch.Tensor:
        asked.extend(texts)
        return embeddings

    monkeypatch.setattr(text, "clip_embeddings", clip)
    given = config(dataset, tmp_path, text="auto", prompts={"dark_spot": "a burnt place"})
    begin(monkeypatch, given)
    assert asked == ["bright spot", "a burnt place"]
    assert yaml.safe_load((tmp_path / "prompts.yaml").read_text()) == {
        "embeddings": "CLIP ViT-B/32",
        "texts": {"bright_spot": "bright spot", "dark_spot": "a burnt place"},
    }
    start = yolo_world.load_model(str(tmp_path / "weights" / "start.pt"))
    assert torch.equal(start.txt_feats[0], embeddings)
    assert not isinstance(start.txt_feats, torch.nn.Parameter)
