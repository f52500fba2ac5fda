"""`pipeline finetune-head` on a tiny dataset, and the head behind it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rectangles import Defects, write_dataset
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from pipeline import cli
from pipeline.config import EvaluateConfig, FinetuneHeadConfig, SegmentConfig, build
from pipeline.errors import UserError
from pipeline.models import head as heads
from pipeline.models.ecrt import SourceMap
from pipeline.models.head import Head, Whitening
from pipeline.models.imagenet import LITE0_MEAN, LITE0_STD, efficientnet_lite0
from pipeline.stages import evaluate, finetune_head, segment

METHODS = ("plain", "balanced-sampling", "balanced-weights", "ecrt")
SCRATCH: Defects = [("scratch", (10, 30, 90, 38))]  # wide and low
STAIN: Defects = [("stain", (40, 10, 60, 64))]  # narrow and high
GOOD: Defects = []


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good images to learn, 4 with scratches and 2 with stains."""
    splits = {
        "train": [GOOD] * 12 + [SCRATCH] * 4 + [STAIN] * 2,
        "val": [GOOD, GOOD, SCRATCH, STAIN],
        "test": [GOOD, STAIN, SCRATCH],
    }
    return write_dataset(tmp_path_factory.mktemp("data") / "d", splits)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(
    dataset: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the stage on small images with few epochs; returns the predictions."""
    monkeypatch.setattr(finetune_head, "EPOCHS", 5)

    def run(out: Path, method: str = "plain", **options: Any) -> dict[str, Any]:
        values = {"data": dataset, "out": out, "method": method, "image_size": 64}
        values |= {"device": "cpu", "cache": cache}
        finetune_head.run(build(FinetuneHeadConfig, values | options))
        found: dict[str, Any] = json.loads((out / "predictions.json").read_text())
        return found

    return run


@pytest.mark.parametrize("method", METHODS)
def test_outputs(run: Callable[..., dict[str, Any]], tmp_path: Path, method: str) -> None:
    predictions = run(tmp_path / "out", method)
    assert method in predictions["name"]
    assert predictions["classes"] == ["good", "scratch", "stain"]
    assert [image["id"] for image in predictions["images"]] == list(range(19, 26))  # val, test
    for image in predictions["images"]:
        assert sum(image["probabilities"]) == pytest.approx(1, abs=1e-5)
    decided = [int(np.argmax(image["probabilities"])) for image in predictions["images"]]
    accuracies = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [values["images"] for values in accuracies.values()] == [18, 4, 3]
    assert accuracies["val"]["accuracy"] == np.mean(np.array(decided[:4]) == [0, 0, 1, 2])
    assert accuracies["test"]["accuracy"] == pytest.approx(
        np.mean(np.array(decided[4:]) == [0, 2, 1])
    )
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [row["components"] for row in rows] == ["8"] * 5 + ["16"] * 5  # of 18 images
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert record["command"] == "finetune-head"
    assert 0 < record["seconds_per_image"] < 60
    assert record["chosen"]["components"] == float(best["components"])
    assert record["chosen"]["val_loss"] == pytest.approx(float(best["val_loss"]), rel=1e-4)


def test_it_learns(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Rectangles of two shapes on a plain ground are told apart."""
    predictions = run(tmp_path / "out", "balanced-weights")
    decided = [int(np.argmax(image["probabilities"])) for image in predictions["images"]]
    assert decided == [0, 0, 1, 2, 0, 2, 1]


def test_the_chosen_head_is_the_one_that_is_written(
    run: Callable[..., dict[str, Any]], dataset: Path, tmp_path: Path
) -> None:
    """The validation loss that was chosen, computed again from the file and the probabilities."""
    predictions = run(tmp_path / "out", "ecrt")
    chosen = json.loads((tmp_path / "out" / "run.json").read_text())["chosen"]
    own = [predictions["images"][i]["probabilities"][label] for i, label in enumerate((0, 0, 1, 2))]
    losses = -np.log(own)
    expected = np.mean([losses[:2].mean(), losses[2], losses[3]])  # every class counts the same
    assert chosen["val_loss"] == pytest.approx(expected, abs=1e-4)
    head = heads.load(tmp_path / "out" / "head.safetensors")
    assert head.whitening.basis.shape == (1280, chosen["components"])
    assert head.map is not None


def test_the_seed_decides(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, "ecrt", seed=seed)
    first, same, other = (
        (tmp_path / name / "head.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert first == same != other


@pytest.mark.parametrize("augmentation", ["gaussian", "none"])
def test_augmentations_differ(
    run: Callable[..., dict[str, Any]], tmp_path: Path, augmentation: str
) -> None:
    shuffled = run(tmp_path / "a", "ecrt")
    other = run(tmp_path / "b", "ecrt", augmentation=augmentation)
    assert augmentation in other["name"]
    assert shuffled["images"] != other["images"]


def test_features_are_those_of_the_network(dataset: Path) -> None:
    """Means over places of what timm calls the features, of images as the network wants them."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    network = efficientnet_lite0(pretrained=True).eval()
    x = (images / 255 - torch.tensor(LITE0_MEAN)[:, None, None]) / LITE0_STD[0]
    with torch.no_grad():
        expected = network.forward_features(x).mean(dim=(2, 3))
        logits = network(x)
    found = heads.Encoder(64)(images)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(network.classifier(found), logits, atol=1e-3)


def test_the_cache_takes_the_place_of_the_network(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "a")

    def forbidden(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(timm.models.efficientnet.EfficientNet, "forward_features", forbidden)
    assert run(tmp_path / "b") == first


def test_whitening_is_that_of_scikit_learn() -> None:
    features = np.random.default_rng(0).normal(3, 2, (20, 6)) @ np.diag([5, 4, 3, 2, 1, 0.5])
    found = Whitening(6, 3).fit(torch.from_numpy(features).float())(
        torch.from_numpy(features).float()
    )
    expected = PCA(3, whiten=True, svd_solver="full").fit_transform(features)
    assert found.numpy() == pytest.approx(expected, abs=1e-4)


def test_whitening_of_equal_images() -> None:
    features = torch.ones(5, 6)
    assert Whitening(6, 3).fit(features)(features).tolist() == [[0, 0, 0]] * 5


@pytest.mark.parametrize("labels", [[0, 1, 2] * 8, [0, 2] * 12], ids=["all", "two of three"])
def test_linear_is_that_of_scikit_learn(labels: list[int]) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, 4)) + np.array(labels)[:, None]
    weights = rng.uniform(0.5, 2, 24)
    head = Head(("good", "a", "b"), 32, Whitening(4, 4), None)
    head.whitening.basis.copy_(torch.eye(4))
    heads.fit_linear(head, features, np.array(labels), weights, 0.7)
    expected = LogisticRegression(C=0.7, max_iter=1000).fit(features, labels, weights)
    with torch.no_grad():
        found = head(torch.from_numpy(features).float()).softmax(dim=1).numpy()
    assert found[:, expected.classes_] == pytest.approx(expected.predict_proba(features), abs=1e-4)
    assert found.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("sources", [False, True])
def test_round_trip(sources: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whitening = Whitening(heads.CHANNELS, 4)
    whitening.basis.copy_(torch.randn_like(whitening.basis))
    head = Head(("good", "a"), 96, whitening, SourceMap(4) if sources else None)
    heads.save(head, tmp_path / "head.safetensors")
    loaded = heads.load(tmp_path / "head.safetensors")
    features = torch.randn(3, heads.CHANNELS)
    assert (loaded.classes, loaded.image_size) == (("good", "a"), 96)
    assert torch.equal(loaded(features), head(features))


def test_load_rejects_other_files(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(b"not weights")
    for bad in (path, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match="expected a classifier head"):
            heads.load(bad)


def test_evaluate_takes_it(
    run: Callable[..., dict[str, Any]], dataset: Path, sam: str, tmp_path: Path
) -> None:
    run(tmp_path / "head", "balanced-sampling")
    predicted, measured = tmp_path / "predictions", tmp_path / "evaluation"
    options = {"source": dataset, "boxes": "truth", "sam": sam, "out": predicted, "device": "cpu"}
    segment.run(build(SegmentConfig, options))
    evaluate.run(
        build(
            EvaluateConfig,
            {"data": dataset, "predictions": predicted, "classifiers": [tmp_path / "head"]}
            | {"out": measured, "resamples": 10},
        )
    )
    decisions = json.loads((measured / "metrics.json").read_text())["image_decision"]
    accuracies = json.loads((tmp_path / "head" / "accuracy.json").read_text())
    found = decisions["frozen efficientnet-lite0 (balanced-sampling)"]
    assert found["accuracy"] == pytest.approx(accuracies["test"]["accuracy"], abs=1e-6)


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of bad input, which is one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune-head", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ("--data", str(dataset), "--out", str(out))
    for flags, problem in (
        (("--method", "smote"), "--method: expected 'plain', "),
        (("--fold", "3"), "fold3_train"),
        (("--image-size", "8"), "--image-size: expected greater than or equal to 32, found '8'"),
        (("--device", "tpu"), "--device: expected auto, cpu, mps or"),
        (("--data", str(tmp_path)), "expected a folder written by `pipeline convert`"),
        (("--cache", str(dataset / "data.yaml")), "--cache: expected a folder, found the file"),
    ):
        assert problem in one_line(capsys, *given, *flags)
        assert not out.exists()


@pytest.mark.parametrize(
    ("splits", "problem"),
    [
        ({"train": [GOOD, STAIN], "test": [GOOD]}, "expected images in .* val split, found none"),
        ({"train": [GOOD] * 3, "val": [GOOD]}, "expected images of two classes .* found one"),
        ({"train": [GOOD, STAIN], "val": [SCRATCH]}, "of the train split's classes .* found none"),
    ],
)
def test_datasets_that_cannot_be_learned(
    splits: dict[str, list[Defects]], problem: str, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "d", splits)
    config = build(FinetuneHeadConfig, {"data": data, "out": tmp_path / "out", "device": "cpu"})
    with pytest.raises(UserError, match=problem):
        finetune_head.run(config)
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_images_is_never_decided_for(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {
        "train": [GOOD] * 4 + [STAIN] * 2,
        "val": [GOOD, STAIN, SCRATCH],
        "test": [SCRATCH, STAIN],
    }
    data = write_dataset(tmp_path / "d", splits)
    for method in METHODS:
        predictions = run(tmp_path / method, method, data=data)
        assert {image["probabilities"][1] for image in predictions["images"]} == {0}
        assert "not learned, for the training images show none: scratch" in capsys.readouterr().out
        chosen = json.loads((tmp_path / method / "run.json").read_text())["chosen"]
        assert chosen["val_loss"] < 5  # the image of the unknown class does not count


def test_finished_result_is_not_replaced(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(tmp_path / "out")
    before = (tmp_path / "out" / "head.safetensors").read_bytes()
    with pytest.raises(UserError, match="--force"):
        run(tmp_path / "out", "ecrt")
    assert (tmp_path / "out" / "head.safetensors").read_bytes() == before


@pytest.mark.parametrize("option", ["tensorboard", "mlflow"])
def test_loggers(run: Callable[..., dict[str, Any]], tmp_path: Path, option: str) -> None:
    run(tmp_path / "out", **{option: tmp_path / "logs"})
    assert any((tmp_path / "logs").rglob("*"))
