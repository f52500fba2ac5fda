"""`pipeline evaluate`: input that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluated import BOX, World, edit, evaluate, one_of_each

from pipeline import cli
from pipeline.errors import UserError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return one_of_each(tmp_path)


def test_masks_of_the_val_split_have_to_fit_too(world: World) -> None:
    image = world.add("val", (1, BOX))
    predictions = world.predict("found", (1, 1, BOX, 0.9), (image, 1, BOX, 0.9), quality=(1, 1))
    edit(predictions / "predictions.json", lambda c: c[1]["segmentation"].update(size=[4, 5]))
    with pytest.raises(
        UserError, match=f"image {image}: expected a mask as run lengths, of 64 rows"
    ):
        evaluate(world.write(), predictions)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("found/images.json", lambda c: c["images"].pop(0), "image 1: expected bent_lead__001.png"),
        ("found/images.json", lambda c: c["images"][0].update(width=9), "found .* with 9x64"),
        ("found/images.json", lambda c: c["categories"].pop(), "expected the classes"),
        ("found/images.json", lambda c: c.pop("images"), "expected COCO images"),
        ("found/predictions.json", lambda c: c[0].update(category_id=5), "category of 1 to 4"),
        ("found/predictions.json", lambda c: c[0].pop("segmentation"), "all 2 entries or in none"),
        (
            "found/predictions.json",
            lambda c: c[0]["segmentation"].update(size=[4, 5]),
            "expected a mask as run lengths, of 64 rows and 64 columns, found .4, 5.",
        ),
        (
            "found/predictions.json",
            lambda c: c[1].update(quality=0.5),
            "expected quality in all 2 entries or in none, found 1",
        ),
        ("found/predictions.json", lambda c: c[0].update(quality=1.5), "quality of 0 to 1, found"),
        ("truth_boxes/predictions.json", lambda c: c.pop(0), "--truth-boxes: expected a mask"),
        ("model/predictions.json", lambda c: c["classes"].pop(), "expected the classes"),
        ("model/predictions.json", lambda c: c["images"].pop(1), "expected cut_lead__002.png"),
        (
            "model/predictions.json",
            lambda c: [i["probabilities"].pop(0) for i in c["images"]],
            "expected 5 prob",
        ),
        ("model/predictions.json", lambda c: c.pop("name"), "predictions of a classifier"),
        ("model/predictions.json", lambda c: c["images"][1].update(width=9), "found cut_.* 9x64"),
        ("model/predictions.json", lambda c: c["images"][1].update(id=1), "1.* once, found 1 2 t"),
        (
            "model/predictions.json",
            lambda c: c["images"][1].update(probabilities=[0.5, 0.2, 0, 0, 0]),
            "images.1.probabilities: expected probabilities that sum to 1, found 0.7",
        ),
        (
            "model/predictions.json",
            lambda c: c["images"][1].update(probabilities=[2, -1, 0, 0, 0]),
            r"images.1.probabilities.0: expected less than or equal to 1, found 2 \(and 1 more\)",
        ),
        ("found/predictions.json", lambda c: c[0].update(score=5), "a number of 0 to 1, found 5"),
        ("found/predictions.json", lambda c: c[0]["segmentation"].update(counts=3), "run lengths"),
        ("found/images.json", lambda c: c["images"][1].update(id=[2]), "whole number, found .2."),
        ("found/images.json", lambda c: c["images"][0].pop("width"), "images.0.width: .* none"),
        ("found/images.json", lambda c: c["categories"].reverse(), "ids from 1 on, in their order"),
        ("found/images.json", lambda c: c.update(categories=3), "categories: expected a list"),
    ],
)
def test_input_that_does_not_fit_is_refused(
    world: World, file: str, change: Any, message: str
) -> None:
    predictions = world.predict("found", (1, 1, BOX, 0.9), (2, 2, BOX, 0.9))
    options = {
        "truth_boxes": world.truth_boxes(),
        "classifiers": (world.classify("model", "m", dict.fromkeys(range(1, 7), "good")),),
    }
    data = world.write()
    edit(world.root / file, change)
    with pytest.raises(UserError, match=message):
        evaluate(data, predictions, **options)
    assert not (world.root / "out").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_split_is_not_taken_for_a_missing_one(
    world: World, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world.add(split, (1, BOX))
    data, predictions = world.write(), world.predict("found", (1, 1, BOX, 0.9))
    path = data / "annotations" / f"instances_{split}.json"
    path.write_text(path.read_text()[:-20])
    command = ["evaluate", "--data", data, "--predictions", predictions, "--out", world.root / "o"]
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in command])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path}: expected a JSON file, found " in line
    assert not (world.root / "o").exists()
