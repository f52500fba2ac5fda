"""The review video, read back: its pixels tell which image, verdict and mask it shows."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
import cv2
import numpy as np
import pytest
import supervision as sv

from pipeline.config import OverlayConfig, build
from pipeline.data import draw, heatmaps, paint, palette, text
from pipeline.data.files import read_json, write_json
from pipeline.data.masks import encode_rle
from pipeline.data.matching import Verdict
from pipeline.data.predictions import write_predictions
from pipeline.data.video import frames, probe
from pipeline.data.writers import create
from pipeline.errors import UserError
from pipeline.stages import overlay

CLASSES = ("crack", "stain")
SIZE = 100  # width and height of the images
BOX = (10, 20, 40, 60)  # where the defects are: x1, y1, x2, y2
OTHER = (60, 20, 90, 60)

# name, grey level of the image, true (class, box), predicted (class, box, score), verdict
IMAGES: list[tuple[str, int, list[Any], list[Any], str]] = [
    ("crack__a.png", 40, [(0, BOX)], [(0, BOX, 0.9)], "hit"),
    ("crack__b.png", 60, [(0, BOX)], [(0, (10, 20, 40, 50), 0.8)], "hit"),  # IoU 0.75
    ("crack__c.png", 80, [(0, BOX)], [(1, BOX, 0.7)], "wrong class"),
    ("good__a.png", 100, [], [], "correct"),
    ("good__b.png", 120, [], [(1, BOX, 0.4)], "false alarm"),
    ("good__c.png", 140, [], [(1, BOX, 0.6)], "false alarm"),
    ("good__d.png", 160, [], [(1, BOX, 0.1)], "correct"),  # under the threshold
    ("stain__a.png", 180, [(1, BOX)], [], "miss"),
    ("stain__b.png", 200, [(1, BOX), (1, OTHER)], [(1, BOX, 0.9)], "miss"),  # half is found
]
BY_CLASS = [40, 60, 80, 180, 200, 100, 120, 140, 160]
BY_ERROR = [80, 180, 200, 140, 120, 60, 40, 100, 160]


def rectangle(box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def instance(image_id: int, cls: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": cls + 1,
        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
        "segmentation": encode_rle(rectangle(box)),
    }


def write_image(path: Path, level: int) -> None:
    assert cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), level, np.uint8))


def write_data(root: Path, images: list[tuple[str, int, list[Any], list[Any], str]]) -> None:
    """A dataset in `root/data` and predictions in `root/predictions`."""
    (root / "data" / "images").mkdir(parents=True)
    coco_images: list[Any] = []
    annotations: list[Any] = []
    results: list[Any] = []
    for image_id, (name, level, truth, predicted, _) in enumerate(images, start=1):
        write_image(root / "data" / "images" / name, level)
        coco_images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for cls, box in truth:
            entry = instance(image_id, cls, box) | {"area": 1, "id": len(annotations) + 1}
            annotations.append(entry | {"iscrowd": 0})
        for cls, box, score in predicted:
            results.append(instance(image_id, cls, box) | {"score": score, "quality": 0.5})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    coco = {"images": coco_images, "annotations": annotations, "categories": categories}
    for stem in ("instances", "instances_test"):
        write_json(root / "data" / "annotations" / f"{stem}.json", coco)
    write_predictions(root / "predictions", results, coco_images, CLASSES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlay")
    write_data(root, IMAGES)
    return root


def configured(root: Path, out: Path, **options: Any) -> OverlayConfig:
    values: dict[str, Any] = {
        "source": root / "data",
        "predictions": root / "predictions",
        "out": out,
    }
    values |= {"height": 200, "seconds_per_image": 0.1, "title_seconds": 0}
    return build(OverlayConfig, values | options)


def film(root: Path, out: Path, **options: Any) -> list[np.ndarray]:
    """The frames of a review video."""
    overlay.run(configured(root, out, **options))
    return [frame.image for frame in frames(out)]


def level_of(image: np.ndarray) -> int:
    """The grey level of the image shown: of a corner of the first panel where no defect is."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    inside = (rows > 190) & (rows < 225) & (columns > 30) & (columns < 60)
    return int(round(np.median(image[inside]) / 20) * 20)


def verdict_of(image: np.ndarray) -> str:
    """The verdict whose colour the frame's border has."""
    border = image[2, image.shape[1] // 2].astype(int)
    distance = {v: np.abs(border - c.as_bgr()).sum() for v, c in palette.VERDICT_COLOURS.items()}
    return min(distance, key=lambda word: distance[word])


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


def test_what_is_anomalous_without_a_class_is_said(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "predictions", tmp_path / "predictions")
    images = read_json(tmp_path / "predictions" / "images.json")
    for image in images["images"]:
        image["anomaly"] = {"score": 2.0, "threshold": 3.0 if "good" in image["file_name"] else 2.0}
    write_json(tmp_path / "predictions" / "images.json", images)
    found = overlay.Predictions(tmp_path / "predictions", 0.5)
    known = [found.is_unknown(name, i) for i, (name, *_) in enumerate(IMAGES, start=1)]
    assert [IMAGES[i][0] for i in np.flatnonzero(known)] == ["stain__a.png"]
    plain = film(root, tmp_path / "a.mp4")
    said = film(root, tmp_path / "b.mp4", predictions=tmp_path / "predictions")
    changed = [np.abs(a[:40].astype(int) - b[:40]).max() > 60
               for a, b in zip(plain, said, strict=True)]  # fmt: skip
    assert [level_of(said[i]) for i in np.flatnonzero(changed)] == [180]


def test_how_long_an_image_stays(root: Path, tmp_path: Path) -> None:
    for seconds, count in [(0.1, 1), (1.0, 10), (0.25, 2)]:
        out = tmp_path / f"{seconds}.mp4"
        overlay.run(configured(root, out, seconds_per_image=seconds))
        info = probe(out)
        assert info.frames == 9 * count
        assert float(info.frames / info.fps) == pytest.approx(9 * seconds)


def test_without_predictions_the_truth_alone(root: Path, tmp_path: Path) -> None:
    shown = film(root, tmp_path / "a.mp4", predictions=None)
    assert [level_of(image) for image in shown] == BY_CLASS
    assert shown[0].shape == film(root, tmp_path / "b.mp4", layout="truth")[0].shape
    assert verdict_of(shown[0]) != verdict_of(film(root, tmp_path / "c.mp4")[0])  # no border


def test_without_a_threshold_each_image_has_that_of_its_fold(root: Path, tmp_path: Path) -> None:
    def given(asked: float | None, **own: float) -> overlay.Predictions:
        images = read_json(root / "predictions" / "images.json")
        for image in images["images"]:
            image |= own
        write_json(tmp_path / "images.json", images)
        write_json(tmp_path / "predictions.json", read_json(root / "predictions/predictions.json"))
        return overlay.Predictions(tmp_path, asked)

    name, _, _, predicted, _ = next(i for i in IMAGES if i[0] == "good__d.png")
    assert [score for _, _, score in predicted] == [0.1]
    assert len(given(None).of(name, 1, (SIZE, SIZE))) == 0  # the default is 0.25
    assert len(given(None, threshold=0.1).of(name, 1, (SIZE, SIZE))) == 1
    assert len(given(0.2, threshold=0.1).of(name, 1, (SIZE, SIZE))) == 0  # what is given counts
    assert (given(None).cut, given(None, threshold=0.1).cut) == ("0.25", "0.1")


def test_a_folder_of_images(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    shown = film(root, out, source=root / "data" / "images")
    assert [level_of(image) for image in shown] == [level for _, level, _, _, _ in IMAGES]
    assert probe(out).fps == 10


def test_a_video_keeps_its_frame_rate(tmp_path: Path) -> None:
    source = tmp_path / "belt.mp4"
    levels = [40, 100, 160, 200]
    with create(source, Fraction(24)) as video:
        for level in levels:
            video.write(np.full((SIZE, SIZE, 3), level, np.uint8))
    names = [f"belt_{i:06d}" for i in range(4)]
    images = [
        {"id": i, "file_name": name, "width": SIZE, "height": SIZE}
        for i, name in enumerate(names, start=1)
    ]
    result = instance(2, 0, BOX) | {"score": 0.9}
    write_predictions(tmp_path / "predictions", [result], images, CLASSES)
    out = tmp_path / "a.mp4"
    shown = film(tmp_path, out, source=source)
    assert probe(out).fps == 24
    assert [level_of(image) for image in shown] == levels
    crack = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    marked = [(np.abs(image[60:190].astype(int) - crack).max(axis=2) < 40).sum() for image in shown]
    assert marked[1] > 100 and marked[0] == marked[2] == marked[3] == 0


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


def test_an_existing_video_is_kept_or_replaced(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"old")
    with pytest.raises(UserError, match="--force"):
        overlay.run(configured(root, out))
    assert out.read_bytes() == b"old"
    overlay.run(configured(root, out, force=True))
    assert probe(out).frames == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json"]


def test_images_of_several_sizes_make_one_video(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    sizes = [(64, 64), (200, 50), (50, 200), (7, 5)]
    for i, (width, height) in enumerate(sizes):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((height, width, 3), 100, np.uint8))
    images = [
        {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes)
    ]
    write_predictions(tmp_path / "predictions", [], images, CLASSES)
    assert len({image.shape for image in film(tmp_path, tmp_path / "a.mp4", source=folder)}) == 1


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
    assert "expected the classes crack, stain" in other(lambda c: c["categories"].reverse())
    assert "category ids from 1 to 1, found 2" in other(lambda c: c["categories"].pop())


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """An image is 30 kB here, its masks 10 kB each: kept, 100 more would be 1 MB at least."""

    def peak(count: int) -> int:
        root = tmp_path / str(count)
        write_data(root, [(f"crack__{i:03d}.png", 90, *IMAGES[0][2:]) for i in range(count)])
        config = configured(root, root / "a.mp4", height=128, order="worst")
        tracemalloc.start()
        overlay.run(config)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(3)  # fonts and imports
    assert peak(120) - peak(20) < 800_000


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


ABOVE_LEGEND = np.s_[:250]
LAYOUTS_OF_ONE = ("truth", "prediction")


def test_blink_without_truth_shows_the_bare_image(root: Path, tmp_path: Path) -> None:
    images = root / "data" / "images"
    shown = film(root, tmp_path / "a.mp4", source=images, layout="blink", seconds_per_image=1.0)
    stain = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    painted = [(np.abs(f[70:190].astype(int) - stain).max(axis=2) < 40).sum() for f in shown[:10]]
    assert max(painted[:5]) == 0 and min(painted[5:]) > 50


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


def chapters(path: Path) -> list[tuple[str, float, float]]:
    with av.open(str(path)) as container:
        found = container.chapters()
    return [
        (c["metadata"]["title"], round(float(c["start"] * c["time_base"]), 2),
         round(float(c["end"] * c["time_base"]), 2))
        for c in found
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("crack", 0, 0.3), ("stain", 0.3, 0.5), ("good", 0.5, 0.9)]),
        (
            {"order": "worst", "only": "errors"},
            [("misses and wrong classes", 0, 0.3), ("false alarms", 0.3, 0.5)],
        ),
        ({"order": "worst", "only": "class=good"}, [("correct", 0, 0.2)]),
        ({"order": "file"}, [("crack", 0, 0.3), ("good", 0.3, 0.7), ("stain", 0.7, 0.9)]),
        ({"order": "score"}, []),
        ({"title_seconds": 2.0}, [("title", 0, 2), ("crack", 2, 2.3), ("stain", 2.3, 2.5),
                                  ("good", 2.5, 2.9)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chapters(
    root: Path, tmp_path: Path, options: dict[str, Any], expected: list[Any], suffix: str
) -> None:
    overlay.run(configured(root, tmp_path / f"a{suffix}", **options))
    assert chapters(tmp_path / f"a{suffix}") == expected


def test_the_title_card_says_what_was_measured(root: Path, tmp_path: Path) -> None:
    """Each of name, source, figures and verdicts changes the card; the picture has its size."""

    def card(**options: Any) -> np.ndarray:
        out = tmp_path / "frames"
        overlay.run(configured(root, out, title_seconds=1.0, force=True, **options))
        assert len(list(out.glob("*.png"))) == 10
        image = cv2.imread(str(out / "000001.png"))
        assert image.shape == cv2.imread(str(out / "000002.png")).shape
        return image

    def evaluation(value: float) -> Path:
        metrics = {"box": {"map50": value}, "mask": None, "missed": [{}], "instances": 3}
        write_json(tmp_path / "evaluation" / "metrics.json", metrics)
        return tmp_path / "evaluation"

    plain = card(title="run 7")
    assert (plain == card(title="run 7")).all()
    assert (plain != card(title="run 8")).any()
    one, other = (card(title="run 7", evaluation=evaluation(v)) for v in (0.25, 0.75))
    changed = np.nonzero((one != other).any(axis=2))
    assert changed[0].max() - changed[0].min() < 20  # one line, and the end of it
    assert changed[1].max() - changed[1].min() < 40
    misses = np.abs(plain.astype(int) - palette.VERDICT_COLOURS["miss"].as_bgr()).max(axis=2) < 3
    assert misses.sum() > 100  # the pill that counts them


@pytest.mark.parametrize(
    ("fps", "seconds", "frames_per_image", "rate"),
    [(25.0, 1.0, 25, 25), (29.97, 0.5, 15, Fraction(2997, 100)), (2.0, 0.5, 1, 2)],
)
def test_a_given_rate(
    root: Path, tmp_path: Path, fps: float, seconds: float, frames_per_image: int, rate: Fraction
) -> None:
    out = tmp_path / "a.mp4"
    overlay.run(configured(root, out, fps=fps, seconds_per_image=seconds))
    info = probe(out)
    assert info.frames == 9 * frames_per_image
    assert float(info.fps) == pytest.approx(float(rate), rel=1e-3)


@pytest.mark.parametrize(("fps", "count"), [(12.0, 12), (24.0, 24), (48.0, 48), (1.0, 1)])
def test_a_video_lasts_as_long_at_another_rate(tmp_path: Path, fps: float, count: int) -> None:
    source = belt(tmp_path, [100] * 24)
    out = tmp_path / "a.mp4"
    overlay.run(configured(tmp_path, out, source=source, fps=fps))
    assert (probe(out).frames, probe(out).fps) == (count, fps)


def belt(root: Path, levels: list[int]) -> Path:
    """A video of 24 frames a second, and predictions without instances for it."""
    source = root / "belt.mp4"
    with create(source, Fraction(24)) as video:
        for level in levels:
            video.write(np.full((SIZE, SIZE, 3), level, np.uint8))
    images = [
        {"id": i, "file_name": f"belt_{i - 1:06d}", "width": SIZE, "height": SIZE}
        for i in range(1, len(levels) + 1)
    ]
    write_predictions(root / "predictions", [], images, CLASSES)
    return source


@pytest.mark.parametrize("name", ["a.webm", "a.gif", "a"])
def test_other_containers_show_the_same(root: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    overlay.run(configured(root, out))
    images = [f.image for f in frames(out)][: len(BY_CLASS)]
    assert [level_of(image) for image in images] == BY_CLASS
    verdicts = {level: verdict for _, level, _, _, verdict in IMAGES}
    assert [verdict_of(image) for image in images] == [verdicts[level] for level in BY_CLASS]
    with pytest.raises(UserError, match="--force"):
        overlay.run(configured(root, out))
    overlay.run(configured(root, out, force=True, only="class=good"))
    assert len(list(frames(out))) in (2, 3)  # GIF repeats its last


def test_ended_half_way_it_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """A kill that cannot be caught is in tests/test_video.py: a video has no name until its end."""
    out = tmp_path / "frames"
    words = ["--source", root / "data", "--predictions", root / "predictions", "--out", out]
    command = [sys.executable, "-m", "pipeline", "overlay", "--height", 1440, *words]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".frames-*/000002.png")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["side-by-side", "blink"])
def test_one_image(tmp_path: Path, layout: str) -> None:
    write_data(tmp_path, IMAGES[:1])
    shown = film(tmp_path, tmp_path / "a.mp4", layout=layout, title_seconds=0.5)
    assert level_of(shown[-1]) == 40
    assert [name for name, _, _ in chapters(tmp_path / "a.mp4")] == ["title", "crack"]


def test_a_recording_held_upright_is_shown_upright(tmp_path: Path) -> None:
    """The matrix of `tkhd` that turns clockwise, as in tests/test_video.py."""
    source = belt(tmp_path, [100] * 4)
    image = np.full((96, 128, 3), 30, np.uint8)
    image[:, :64] = 220  # the left half, which a turn makes the upper one
    with create(source, Fraction(24)) as video:
        for _ in range(4):
            video.write(image)
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    turned = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    source.write_bytes(data)
    coco = read_json(tmp_path / "predictions" / "images.json")
    for entry in coco["images"]:
        entry |= {"width": 96, "height": 128}
    write_json(tmp_path / "predictions" / "images.json", coco)
    frame = film(tmp_path, tmp_path / "a.mp4", source=source)[0]
    panel = frame[60:240].astype(int)
    middle = panel[:, frame.shape[1] // 2].mean(axis=1)
    assert middle[:60].min() > 200 and middle[-60:].max() < 50
    assert frame.shape[0] > frame.shape[1]


def test_a_folder_of_other_things_is_kept(root: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="found other files"):
        overlay.run(configured(root, tmp_path / "frames", force=True))
    assert (tmp_path / "frames" / "holiday.png").read_bytes() == b"mine"


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


def test_small_defects_are_enlarged_in_every_panel_alike(root: Path, tmp_path: Path) -> None:
    """A black spot of 4 pixels in 100 has about 4 x 4 at a panel of 100, and much more enlarged."""
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    image[50:54, 70:74] = 0
    drawer = draw.ReviewDrawer(CLASSES, ("truth", "prediction"), (200, 200))
    nothing: tuple[sv.Detections, list[str]] = (sv.Detections.empty(), [])
    box = np.array([[70, 50, 74, 54]], np.float32)

    def dark(details: np.ndarray | None) -> np.ndarray:
        frame = drawer.draw(image, [nothing, nothing], "", None, "", details)
        return (frame[60:] == 0).all(axis=2)

    half = drawer.size[0] // 2
    plain, enlarged = dark(None), dark(box)
    for part in (np.s_[:, :half], np.s_[:, half:]):
        assert enlarged[part].sum() - plain[part].sum() > 500
    large = np.array([[10, 10, 80, 80]], np.float32)
    assert (dark(large) == plain).all()
    everywhere = np.array([[0, 0, 100, 100]], np.float32)  # no corner is free
    assert (dark(np.vstack([box, everywhere])) == plain).all()


def detections(*boxes: tuple[int, int, int, int], masks: bool = True) -> sv.Detections:
    return sv.Detections(
        xyxy=np.array(boxes, np.float32),
        class_id=np.arange(len(boxes)) % len(CLASSES),
        mask=np.stack([rectangle(box) for box in boxes]) if masks else None,
    )


def panel_of(instances: sv.Detections, side: int = 200) -> np.ndarray:
    """A drawn panel of `side` pixels on a grey image, cut out of its frame."""
    drawer = draw.ReviewDrawer(CLASSES, ("truth",), (side, side))
    image = np.full((SIZE, SIZE, 3), 128, np.uint8)
    labels = ["x"] * len(instances)
    empty = drawer.draw(image, [(sv.Detections.empty(), [])], "", None)
    rows, columns = np.nonzero((empty == 128).all(axis=2))
    frame = drawer.draw(image, [(instances, labels)], "", None)
    return frame[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_box_and_mask_are_where_they_belong() -> None:
    """The box (10, 20, 40, 60), doubled, covers the columns 20..79 and the rows 40..119."""
    panel = panel_of(detections(BOX))
    assert panel.shape == (200, 200, 3)
    colour = np.array(palette.CLASS_COLOURS.by_idx(0).as_bgr())
    lines = np.abs(panel.astype(int) - colour).max(axis=2) < 3
    rows, columns = np.nonzero(lines[40:])  # the label stands above
    assert (rows.min() + 40, rows.max() + 40) == (40, 119)
    assert (columns.min(), columns.max()) == (20, 79)
    fill = 0.3 * colour + 0.7 * 128
    assert np.abs(panel[60:100, 30:70] - fill).max() <= 1
    assert (panel[125:] == 128).all() and (panel[:, 90:] == 128).all()


def test_a_hole_in_a_mask_stays_open() -> None:
    mask = rectangle(BOX)
    mask[35:45, 20:30] = False
    instances = sv.Detections(np.array([BOX], np.float32), mask[None], class_id=np.array([0]))
    panel = panel_of(instances)
    assert (panel[76:84, 46:54] == 128).all() and not (panel[60, 46:54] == 128).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (99, 99, 100, 100), (0, 99, 1, 100), (50, 50, 51, 51), (30, 0, 31, 1)]
)
def test_a_one_pixel_defect_is_seen(box: tuple[int, int, int, int]) -> None:
    """Its frame of 12 pixels is whole inside the panel, and its label does not hide it."""
    panel = panel_of(detections(box))
    x = min(max(2 * box[0] + 1 - 6, 0), 200 - 12)
    y = min(max(2 * box[1] + 1 - 6, 0), 200 - 12)
    frame = panel[y : y + 12, x : x + 12].astype(int)
    colour = palette.CLASS_COLOURS.by_idx(0).as_bgr()
    lines = np.abs(frame - colour).max(axis=2) < 3
    assert lines[0].all() and lines[-1].all() and lines[:, 0].all() and lines[:, -1].all()
    assert lines.sum() < 100  # a frame, not a filled label


def test_a_mask_thinner_than_a_pixel_of_the_panel_survives() -> None:
    """A line of 1 pixel at a fifth of the size."""
    instances = sv.Detections(
        xyxy=np.array([[0, 52, 100, 53]], np.float32),
        class_id=np.array([0]),
        mask=rectangle((0, 52, 100, 53))[None],
    )
    bare = detections((0, 52, 100, 53), masks=False)
    assert (panel_of(instances, 64) != panel_of(bare, 64)).any()


def test_labels_do_not_hide_boxes_or_each_other() -> None:
    rng = np.random.default_rng(3)
    corners = rng.integers(0, 560, (15, 2)).astype(float)
    boxes = np.hstack([corners, corners + rng.integers(12, 60, (15, 2))])
    boxes = np.vstack([boxes, [[300, 300, 400, 400]] * 4, [[0, 0, 12, 12]], [[628, 628, 639, 639]]])
    sizes = np.tile([110.0, 20.0], (len(boxes), 1))
    spots = paint.label_spots(boxes, sizes, (640, 640))
    labels = np.hstack([np.subtract(spots, (0, 20)), np.add(spots, (110, 0))])
    assert labels.min() >= 0 and labels.max() <= 640
    between = np.triu(sv.box_iou_batch(labels, labels), 1)
    assert between.max() < 0.2
    near = np.abs((labels[:, 1] + labels[:, 3]) / 2 - (boxes[:, 1] + boxes[:, 3]) / 2)
    assert (near < 150).all()
    for i, (x1, y1, x2, y2) in enumerate(boxes):  # hidden part of each box, pixel by pixel
        hidden = np.zeros((641, 641), bool)
        for a1, b1, a2, b2 in labels.round().astype(int):
            hidden[b1:b2, a1:a2] = True
        assert hidden[int(y1) : int(y2), int(x1) : int(x2)].mean() < 0.5, i


def test_an_image_may_be_of_any_shape() -> None:
    drawer = draw.ReviewDrawer(CLASSES, ("truth", "prediction"), (64, 64), note="a note " * 20)
    nothing: tuple[sv.Detections, list[str]] = (sv.Detections.empty(), [])
    for shape in [(1, 1), (1, 500), (500, 1), (2000, 30)]:
        image = np.full((*shape, 3), 128, np.uint8)
        frame = drawer.draw(image, [nothing, nothing], "name" * 50, "miss", "1 / 1000")
        assert frame.shape == (drawer.size[1], drawer.size[0], 3)
        assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0


def test_long_names_are_cut_in_the_middle() -> None:
    name = "a_very_long_name_of_a_file_from_some_camera_at_the_line_000123.png"
    cut = text.elide(name, 18, 300)
    assert text.font(18).getlength(cut) <= 300
    head, tail = cut.split("…")
    assert name.startswith(head) and name.endswith(tail) and len(tail) > 8
    assert text.elide("short.png", 18, 300) == "short.png"
    assert text.elide(name, 18, 0) == ""


def test_every_verdict_has_a_colour_and_a_rank() -> None:
    assert set(palette.VERDICT_COLOURS) == set(overlay.SEVERITY) == set(get_args(Verdict))
    assert len({colour.as_hex() for colour in palette.CLASS_COLOURS.colors}) == 8


@pytest.mark.parametrize(
    ("background", "expected"),
    [("#FFFFFF", sv.Color.BLACK), ("#0072B2", sv.Color.WHITE), ("#F0E442", sv.Color.BLACK)],
)
def test_ink_reads_well(background: str, expected: sv.Color) -> None:
    assert palette.ink(sv.Color.from_hex(background)) == expected
