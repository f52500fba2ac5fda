"""What the review video shows: its pixels tell which image, verdict, mask and heat map it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from filmed import (
    BY_CLASS,
    BY_ERROR,
    IMAGES,
    SIZE,
    configured,
    film,
    level_of,
    verdict_of,
    write_data,
)

from pipeline.data import heatmaps, palette
from pipeline.data.files import read_json, write_json
from pipeline.data.matching import Verdict
from pipeline.data.overlay.predicted import Predictions
from pipeline.data.overlay.reel import SEVERITY
from pipeline.data.video import probe
from pipeline.errors import UserError
from pipeline.stages import overlay


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlay")
    write_data(root, IMAGES)
    return root


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({}, BY_CLASS),
        ({"order": "worst"}, BY_ERROR),
        ({"only": "errors"}, [80, 180, 200, 120, 140]),
        ({"only": "errors", "order": "worst"}, BY_ERROR[:5]),
        ({"order": "worst", "layout": "truth"}, BY_ERROR),
        ({"order": "worst", "layout": "prediction"}, BY_ERROR),
    ],
)
def test_order_and_verdict_of_every_image(
    root: Path, tmp_path: Path, options: dict[str, Any], levels: list[int]
) -> None:
    shown = film(root, tmp_path / "a.mp4", **options)
    assert [level_of(image) for image in shown] == levels
    verdicts = {level: verdict for _, level, _, _, verdict in IMAGES}
    assert [verdict_of(image) for image in shown] == [verdicts[level] for level in levels]


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"order": "file"}, [40, 60, 80, 100, 120, 140, 160, 180, 200]),
        ({"order": "score"}, [40, 200, 60, 80, 140, 120, 100, 160, 180]),
        ({"order": "score", "source": "images"}, [40, 200, 60, 80, 140, 120, 100, 160, 180]),
        ({"order": "class", "source": "images"}, [40, 60, 80, 120, 140, 200, 100, 160, 180]),
        ({"only": ["class=stain"]}, [80, 180, 200, 120, 140]),  # in truth or prediction
        ({"only": ["class=good"]}, [100, 160]),
        ({"only": ["class=good", "class=crack"]}, [40, 60, 80, 100, 160]),
        ({"only": ["errors", "class=crack"]}, [80]),
        ({"only": "class=crack", "source": "images"}, [40, 60]),
    ],
)
def test_order_and_choice(
    root: Path, tmp_path: Path, options: dict[str, Any], levels: list[int]
) -> None:
    if options.get("source") == "images":
        options = options | {"source": root / "data" / "images"}
    assert [level_of(image) for image in film(root, tmp_path / "a.mp4", **options)] == levels


def test_every_verdict_has_a_colour_and_a_rank() -> None:
    assert set(palette.VERDICT_COLOURS) == set(SEVERITY) == set(get_args(Verdict))
    assert len({colour.as_hex() for colour in palette.CLASS_COLOURS.colors}) == 8


def test_panels_side_by_side_or_either_alone(root: Path, tmp_path: Path) -> None:
    both, truth, predicted = (
        film(root, tmp_path / f"{layout}.mp4", layout=layout)[3]  # the miss: nothing is predicted
        for layout in ("side-by-side", "truth", "prediction")
    )
    assert both.shape[1] > truth.shape[1] + 190  # one panel more, of 200 pixels
    stain = palette.CLASS_COLOURS.by_idx(1).as_bgr()

    def painted(image: np.ndarray) -> list[bool]:
        """In each half and in the whole, whether a filled mask of the class is there."""
        mixed = 0.3 * np.array(stain) + 0.7 * 180
        rows = image[70:190].astype(int)
        near = np.abs(rows - mixed).max(axis=2) < 12
        middle = image.shape[1] // 2
        return [bool(part.sum() > 1000) for part in (near[:, :middle], near[:, middle:], near)]

    assert painted(both) == [True, False, True]
    assert painted(truth)[2] and not painted(predicted)[2]


ABOVE_LEGEND = np.s_[:250]
LAYOUTS_OF_ONE = ("truth", "prediction")


def test_side_by_side_shows_each_panel_under_its_caption_and_blink_both_in_turn(
    root: Path, tmp_path: Path
) -> None:
    """Blink has the frames of the two layouts that show one alone, in turn, but for the time."""
    options: dict[str, Any] = {"seconds_per_image": 2.0, "only": "class=stain"}
    blink = film(root, tmp_path / "blink.mp4", layout="blink", **options)
    alone = [film(root, tmp_path / f"{one}.mp4", layout=one, **options) for one in LAYOUTS_OF_ONE]
    assert len(blink) == len(alone[0]) == 100  # 5 images of 20 frames
    for i, shown in enumerate(blink):
        turn = i % 20 // 5  # half a second each
        one, other = (alone[k][i][ABOVE_LEGEND].astype(int) for k in (turn % 2, 1 - turn % 2))
        shown = shown[ABOVE_LEGEND]
        assert np.abs(one - shown).mean() <= np.abs(other - shown).mean()
    differ = [np.abs(alone[0][i][ABOVE_LEGEND].astype(int) - alone[1][i][ABOVE_LEGEND]).mean()
              for i in (25, 45)]  # fmt: skip
    assert min(differ) > 0.5  # stain__a and stain__b differ in their panels, so turns were seen


def test_blink_without_truth_shows_the_bare_image(root: Path, tmp_path: Path) -> None:
    images = root / "data" / "images"
    shown = film(root, tmp_path / "a.mp4", source=images, layout="blink", seconds_per_image=1.0)
    stain = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    painted = [(np.abs(f[70:190].astype(int) - stain).max(axis=2) < 40).sum() for f in shown[:10]]
    assert max(painted[:5]) == 0 and min(painted[5:]) > 50


def test_without_predictions_the_truth_alone(root: Path, tmp_path: Path) -> None:
    shown = film(root, tmp_path / "a.mp4", predictions=None)
    assert [level_of(image) for image in shown] == BY_CLASS
    assert shown[0].shape == film(root, tmp_path / "b.mp4", layout="truth")[0].shape
    assert verdict_of(shown[0]) != verdict_of(film(root, tmp_path / "c.mp4")[0])  # no border


def test_without_a_threshold_each_image_has_that_of_its_fold(root: Path, tmp_path: Path) -> None:
    def given(asked: float | None, **own: float) -> Predictions:
        images = read_json(root / "predictions" / "images.json")
        for image in images["images"]:
            image |= own
        write_json(tmp_path / "images.json", images)
        write_json(tmp_path / "predictions.json", read_json(root / "predictions/predictions.json"))
        return Predictions(tmp_path, asked)

    name, _, _, predicted, _ = next(i for i in IMAGES if i[0] == "good__d.png")
    assert [score for _, _, score in predicted] == [0.1]
    assert len(given(None).of(name, 1, (SIZE, SIZE))) == 0  # the default is 0.25
    assert len(given(None, threshold=0.1).of(name, 1, (SIZE, SIZE))) == 1
    assert len(given(0.2, threshold=0.1).of(name, 1, (SIZE, SIZE))) == 0  # what is given counts
    assert (given(None).cut, given(None, threshold=0.1).cut) == ("0.25", "0.1")


def test_what_is_anomalous_without_a_class_is_said(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "predictions", tmp_path / "predictions")
    images = read_json(tmp_path / "predictions" / "images.json")
    for image in images["images"]:
        image["anomaly"] = {"score": 2.0, "threshold": 3.0 if "good" in image["file_name"] else 2.0}
    write_json(tmp_path / "predictions" / "images.json", images)
    found = Predictions(tmp_path / "predictions", 0.5)
    known = [found.is_unknown(name, i) for i, (name, *_) in enumerate(IMAGES, start=1)]
    assert [IMAGES[i][0] for i in np.flatnonzero(known)] == ["stain__a.png"]
    plain = film(root, tmp_path / "a.mp4")
    said = film(root, tmp_path / "b.mp4", predictions=tmp_path / "predictions")
    changed = [np.abs(a[:40].astype(int) - b[:40]).max() > 60
               for a, b in zip(plain, said, strict=True)]  # fmt: skip
    assert [level_of(said[i]) for i in np.flatnonzero(changed)] == [180]


# ---------------------------------------------------------------- heat maps


def write_heat_maps(root: Path, folder: Path, split: str = "test") -> Path:
    """Of every image: 0 on the left, on the right its level / 200."""
    entries = []
    for image_id, (name, level, *_) in enumerate(IMAGES, start=1):
        values = np.zeros((10, 10), np.float32)
        values[:, 5:] = level / 200
        entry = {"id": image_id, "file_name": name, "width": SIZE, "height": SIZE, "score": 1.0}
        heat_map = heatmaps.write_heat_map(folder, name, values)
        entries.append({**entry, "split": split, "class": "any", "heat_map": heat_map})
    heatmaps.write_scores(folder, entries)
    return folder


@pytest.mark.parametrize(
    ("layout", "others"), [("side-by-side", 2), ("truth", 1), ("prediction", 1), ("blink", 1)]
)
def test_heat_maps_have_a_panel_of_their_own(
    root: Path, tmp_path: Path, layout: str, others: int
) -> None:
    """All on one scale, from black over the image to the brightest colour in the last one."""
    folder = write_heat_maps(root, tmp_path / "heat")
    plain = film(root, tmp_path / "a.mp4", layout=layout)
    hot = film(root, tmp_path / "b.mp4", layout=layout, heat_maps=folder)
    assert len(plain) == len(hot)
    assert hot[0].shape[1] - plain[0].shape[1] > 195
    levels = [level_of(image) for image in hot]
    assert levels == [level_of(image) for image in plain]
    panel = hot[0].shape[1] // (others + 1)
    for frame, level in zip(hot, levels, strict=True):
        left = frame[100:180, -panel + 20 : -panel + 60].reshape(-1, 3).mean(axis=0)
        right = frame[100:180, -80:-40].reshape(-1, 3).mean(axis=0)
        colours = cv2.applyColorMap(
            np.array([[0, round(255 * level / 200)]], np.uint8), cv2.COLORMAP_INFERNO
        )[0]
        for found, colour in ((left, colours[0]), (right, colours[1])):
            np.testing.assert_allclose(found, 0.6 * colour + 0.4 * level, atol=12)


def test_heat_maps_of_all_folds_are_those_that_test_the_image(root: Path, tmp_path: Path) -> None:
    data = shutil.copytree(root / "data", tmp_path / "data") / "annotations"
    coco = read_json(data / "instances.json")
    for k, ids in enumerate((range(1, 6), range(6, 10))):
        own = {key: [e for e in coco[key] if e[name] in ids]
               for key, name in (("images", "id"), ("annotations", "image_id"))}  # fmt: skip
        write_json(data / f"instances_fold{k}_test.json", coco | own)
        folder = write_heat_maps(root, tmp_path / f"heat{k}")
        scores = read_json(folder / "scores.json")
        for image in scores["images"]:
            image["split"] = "test" if image["id"] in ids else "val"
        write_json(folder / "scores.json", scores)
        for image in scores["images"]:  # what another fold tests must not be shown
            if image["id"] not in ids:
                (folder / image["heat_map"]["file"]).unlink()
    options = {"source": tmp_path / "data", "fold": "all", "heat_maps": tmp_path / "heat{fold}"}
    shown = film(root, tmp_path / "a.mp4", **options)
    assert [level_of(image) for image in shown] == BY_CLASS


def test_heat_maps_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    folder = write_heat_maps(root, tmp_path / "heat")
    scores = read_json(folder / "scores.json")
    out = tmp_path / "a.mp4"
    first = scores["images"][0]
    for changed, problem in (
        (scores["images"][1:], f"--heat-maps: expected that of crack__a.png in {folder}, found"),
        ([{**first, "file_name": "b.png"}, *scores["images"][1:]], "image 1: expected crack__a"),
        ([{**first, "width": 7}, *scores["images"][1:]], "100x100 pixels, found crack__a.png with"),
    ):
        write_json(folder / "scores.json", {"images": changed})
        with pytest.raises(UserError, match=problem):
            film(root, out, heat_maps=folder)
        assert not out.exists() and not out.with_name("a.mp4.json").exists()
    with pytest.raises(
        UserError, match=r"nowhere/scores.json: expected a JSON file, found nothing"
    ):
        film(root, out, heat_maps=tmp_path / "nowhere")


# ---------------------------------------------------------------- other sources, bad input


def test_a_folder_of_images(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    shown = film(root, out, source=root / "data" / "images")
    assert [level_of(image) for image in shown] == [level for _, level, _, _, _ in IMAGES]
    assert probe(out).fps == 10


def test_a_coco_file_with_a_results_file(root: Path, tmp_path: Path) -> None:
    """The same as the dataset it was taken from: ids of images and categories are other ones."""
    coco = read_json(root / "data" / "annotations" / "instances.json")
    for image in coco["images"]:
        image["id"] += 500
    for entry in coco["annotations"]:
        entry["image_id"] += 500
        entry["category_id"] = {1: 77, 2: 5}[entry["category_id"]]
    coco["categories"] = [{"id": 77, "name": "crack"}, {"id": 5, "name": "stain"}]
    write_json(tmp_path / "some.json", coco)
    results = read_json(root / "predictions" / "predictions.json")
    for entry in results:
        entry["image_id"] += 500
    write_json(tmp_path / "results.json", results)
    options: dict[str, Any] = {
        "source": tmp_path / "some.json", "images": root / "data" / "images", "order": "worst",
    }  # fmt: skip
    for predictions in (root / "predictions", tmp_path / "results.json"):
        shown = film(root, tmp_path / "a.mp4", predictions=predictions, force=True, **options)
        assert [level_of(image) for image in shown] == BY_ERROR
        verdicts = {level: verdict for _, level, _, _, verdict in IMAGES}
        assert [verdict_of(image) for image in shown] == [verdicts[level] for level in BY_ERROR]


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, [image for image in IMAGES if image[4] in ("hit", "correct")])
    out = tmp_path / "a.mp4"
    overlay.run(configured(tmp_path, out))
    overlay.run(configured(tmp_path, out, only="errors", force=True))
    assert capsys.readouterr().out.splitlines()[-1] == "no errors: no video written"
    assert not out.exists()
    written = read_json(tmp_path / "a.mp4.json")
    assert written["command"] == "overlay"
    assert written["options"]["out"] == str(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": Path("a.avi")}, "--out: expected a file ending in .mp4, .webm or .gif, or"),
        ({"source": Path("missing")}, "--source: expected a dataset, a COCO file, a folder"),
        ({"source": "images", "layout": "truth"}, "--layout: expected a dataset"),
        ({"source": "images", "predictions": None}, "--predictions: expected an output folder"),
        ({"predictions": None, "layout": "prediction"}, "--predictions: expected an output folder"),
        ({"predictions": None, "order": "worst"}, "--order: expected truth and predictions"),
        ({"source": "images", "only": "errors"}, "--only: expected truth and predictions"),
        ({"predictions": Path("missing")}, "missing/images.json: expected a JSON file"),
        ({"split": "val"}, "instances_val.json: expected this split, found test"),
    ],
)
def test_bad_options(root: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if options.get("source") == "images":
        options = options | {"source": root / "data" / "images"}
    with pytest.raises(UserError) as error:
        overlay.run(configured(root, **({"out": tmp_path / "a.mp4"} | options)))
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_predictions_of_something_else(root: Path, tmp_path: Path) -> None:
    def other(change: Callable[[dict[str, Any]], None], **options: Any) -> str:
        coco = read_json(root / "predictions" / "images.json")
        results = read_json(root / "predictions" / "predictions.json")
        change(coco)
        write_json(tmp_path / "p" / "images.json", coco)
        write_json(tmp_path / "p" / "predictions.json", results)
        with pytest.raises(UserError) as error:
            overlay.run(configured(root, tmp_path / "a.mp4", predictions=tmp_path / "p", **options))
        assert [p.name for p in tmp_path.iterdir()] == ["p"]
        return str(error.value)

    folder = root / "data" / "images"
    assert "expected the image good__a.png" in other(lambda coco: coco["images"].pop(3))
    assert "expected the image good__a.png" in other(lambda c: c["images"].pop(3), source=folder)
    assert "expected images in" in other(lambda c: c["images"].clear(), source=folder)
    assert "crack__a.png: expected a size" in other(lambda c: c["images"][0].update(width=5))
    assert "expected the classes crack, stain" in other(
        lambda c: c["categories"][0].update(name="scratch")
    )
    assert "category ids from 1 to 1, found 2" in other(lambda c: c["categories"].pop())
