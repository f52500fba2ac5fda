"""`pipeline evaluate RUN ...`: runs of every kind in one table; figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rectangles import filled, write_dataset
from sklearn.metrics import roc_auc_score

from pipeline import cli
from pipeline.config import DetectAnomalyConfig, EvaluateConfig, build, read_yaml
from pipeline.data.anomaly import resampled_image_auroc
from pipeline.data.coco import write_split
from pipeline.data.files import read_json, write_json, write_text
from pipeline.data.heatmaps import write_heat_map, write_scores
from pipeline.data.masks import encode_rle
from pipeline.data.metrics import draw_resamples
from pipeline.data.predictions import write_predictions
from pipeline.stages import detect_anomaly, evaluate

HEIGHT, WIDTH = 72, 96
STAIN, SCRATCH = (10, 12, 40, 30), (50, 40, 90, 64)
# Ids: train 1, val 2 (good) and 3 (stain), test 4 and 5 (good), 6 (stain), 7 (scratch).
SPLITS = {
    "train": [[]],
    "val": [[], [("stain", STAIN)]],
    "test": [[], [], [("stain", STAIN)], [("scratch", SCRATCH)]],
}
NAMES = ("good", "good", "stain", "good", "good", "stain", "scratch")
OTHERS = {"accuracy", "balanced_accuracy", "macro_f1", "map50", "mask_iou"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", SPLITS)


def name_of(image_id: int) -> str:
    return f"{NAMES[image_id - 1]}__{image_id - 1:03}.png"


def finish(
    folder: Path,
    command: str,
    fold: int | None,
    made: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Make a folder look like the output of a command: its options, and more of its record."""
    write_text(folder / "config.yaml", yaml.safe_dump({"fold": fold, **options}))
    record = {"command": command, "signature": folder.name, "inputs": {}, "seconds": None}
    write_json(folder / "run.json", {**record, **(made or {})})
    return folder


def anomaly(
    folder: Path,
    scores: Mapping[int, float],
    heat: Mapping[int, np.ndarray] | None = None,
    fold: int | None = None,
    **values: Any,
) -> Path:
    """A run of `pipeline detect-anomaly`; without heat maps, every pixel scores 0."""
    entries = [
        {
            "id": image_id,
            "file_name": name_of(image_id),
            "width": WIDTH,
            "height": HEIGHT,
            "split": "test",
            "class": NAMES[image_id - 1],
            "score": score,
            "heat_map": write_heat_map(
                folder,
                name_of(image_id),
                (heat or {}).get(image_id, np.zeros((HEIGHT, WIDTH), np.float32)),
            ),
        }
        for image_id, score in scores.items()
    ]
    write_scores(folder, entries)
    seconds = {"training": 12.5, "inference_per_image": 0.25}
    made = {"method": "cosine", "protocol": "dataset", "fold": fold, "image": {"threshold": 1}}
    made |= {"seconds": seconds, **values}
    write_json(folder / "metrics.json", made)
    return finish(folder, "detect-anomaly", fold)


def classifier(folder: Path, rows: Mapping[int, Sequence[float]]) -> Path:
    """A run of `pipeline finetune-classifier`: probabilities of scratch, good and stain."""
    images = [
        {
            "id": image_id,
            "file_name": name_of(image_id),
            "width": WIDTH,
            "height": HEIGHT,
            "probabilities": list(row),
        }
        for image_id, row in rows.items()
    ]
    about = {"name": "net (scratch)", "classes": ["scratch", "good", "stain"]}
    write_json(folder / "predictions.json", {**about, "images": images})
    made = {"seconds": 60.0, "seconds_per_image": 0.02}
    return finish(folder, "finetune-classifier", None, made)


def detector(
    folder: Path, found: Sequence[tuple[int, int, tuple[int, int, int, int], float]], **options: Any
) -> Path:
    """A run of `pipeline segment`: (image, category, half-open box, score), each box filled."""
    results = [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "segmentation": encode_rle(filled((x1, y1, x2, y2), HEIGHT, WIDTH)),
        }
        for image_id, category, (x1, y1, x2, y2), score in found
    ]
    images = [
        {"id": i, "file_name": name_of(i), "width": WIDTH, "height": HEIGHT} for i in range(2, 8)
    ]
    write_predictions(folder, results, images, ("scratch", "stain"))
    values = {"boxes": "yolo-world-n", "sam": "sam-lite", **options}
    made = {"seconds": 3.0, "inputs": {"boxes": "a checksum", "sam": "another"}}
    return finish(folder, "segment", None, made, **values)


def compare(data: Path, *runs: Path, **options: Any) -> dict[str, Any]:
    out = data.parent / "out"
    values = {"data": data, "runs": runs, "out": out, "resamples": 0, "force": True, **options}
    evaluate.run(build(EvaluateConfig, values))
    return read_json(out / "comparison.json")


# ---- Figures by hand ---------------------------------------------------------------------------


def test_scores_of_images(data: Path, tmp_path: Path) -> None:
    """A defect at 0.5 under a good image at 0.6; on val, every score over 0.2 is a defect."""
    scores = {2: 0.1, 3: 0.3, 4: 0.15, 5: 0.6, 6: 0.5, 7: 0.9}
    values = compare(data, anomaly(tmp_path / "run", scores))
    assert (values["images"], values["defective"], values["fold"]) == (4, 2, None)
    (row,) = values["rows"]
    assert (row["method"], row["label"], row["needs"]) == ("cosine", "cosine", "good images")
    assert row["image_auroc"] == 3 / 4  # of four pairs, one in the wrong order
    assert row["average_precision"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert (row["recall"], row["false_alarm_rate"]) == (1, 0.5)  # threshold: midway, 0.2
    assert (row["training_seconds"], row["inference_seconds_per_image"]) == (12.5, 0.25)
    assert all(row[key] is None for key in OTHERS)  # names no class, has no boxes
    assert row["per_fold"] is None and row["intervals"] == {}


def test_scores_of_pixels(data: Path, tmp_path: Path) -> None:
    """Heat of 1 on the left half of each defect, and of 0.5 on as many pixels of a good image."""
    left = filled((10, 12, 25, 30), HEIGHT, WIDTH) * np.float32(1)
    heat = {
        3: left,
        6: left,
        7: filled((50, 40, 70, 64), HEIGHT, WIDTH) * np.float32(1),
        5: left * np.float32(0.5),
    }
    run = anomaly(tmp_path / "run", dict.fromkeys(range(2, 8), 0.0), heat)
    (row,) = compare(data, run)["rows"]
    assert row["pixel_iou"] == 0.5  # the threshold of val is between 0 and 1: halves, no alarm
    good = 4 * HEIGHT * WIDTH - 30 * 18 - 40 * 24
    rate = 15 * 18 / good  # of the alarm
    auroc = 0.5 + (1 - rate) * 0.25  # (0, .5), (rate, .5), (1, 1)
    assert row["pixel_auroc"] == pytest.approx(auroc, abs=1e-5)
    at_limit = 0.5 + (0.3 - rate) / (1 - rate) * 0.5
    pro = (rate * 0.5 + (0.3 - rate) * (0.5 + at_limit) / 2) / 0.3
    assert row["pro"] == pytest.approx(pro, abs=1e-5)


def test_a_classifier(data: Path, tmp_path: Path) -> None:
    """Image 6, a stain, is taken for a scratch; image 7 for good, though less surely than 4."""
    probabilities = {
        2: (0, 1, 0), 3: (0, 0.2, 0.8), 4: (0.1, 0.8, 0.1), 5: (0, 0.9, 0.1),
        6: (0.6, 0.1, 0.3), 7: (0.3, 0.7, 0),
    }  # fmt: skip
    run = classifier(tmp_path / "run", probabilities)
    (row,) = compare(data, run)["rows"]
    assert (row["method"], row["needs"]) == ("net (scratch)", "labels")
    assert row["image_auroc"] == 1  # 0.9 and 0.3 over 0.2 and 0.1
    assert (row["recall"], row["false_alarm_rate"]) == (0.5, 0)  # threshold: midway, 0.4
    assert row["accuracy"] == 0.5
    assert row["balanced_accuracy"] == pytest.approx(1 / 3, abs=1e-6)  # good 1, others 0
    assert (row["training_seconds"], row["inference_seconds_per_image"]) == (60, 0.02)
    assert row["pixel_auroc"] is row["pixel_iou"] is row["map50"] is row["mask_iou"] is None


FOUND = (
    (3, 2, STAIN, 0.6),
    (2, 1, SCRATCH, 0.2),
    (5, 2, STAIN, 0.3),
    (6, 2, STAIN, 0.9),
    (6, 1, (12, 12, 40, 30), 0.8),  # the same place, another class
    (7, 1, (50, 40, 90, 58), 0.7),  # three quarters of it
)


def test_a_detector(data: Path, tmp_path: Path) -> None:
    (row,) = compare(data, detector(tmp_path / "run", FOUND))["rows"]
    assert (row["method"], row["needs"]) == ("YOLO-World + SAM", "boxes")  # weights as they ship
    assert row["image_auroc"] == 1  # 0.9 and 0.7 over 0.3 and 0
    assert row["accuracy"] == row["balanced_accuracy"] == 1  # from 0.4 on, midway on val
    assert row["map50"] == pytest.approx((1 + 0.5) / 2)  # a scratch too many comes first
    assert row["mask_iou"] == pytest.approx((1 + 0.75) / 2)
    true, found, wrong = 30 * 18 + 40 * 24, 30 * 18 + 40 * 18, 0
    assert row["pixel_iou"] == pytest.approx(found / (true + wrong), abs=1e-6)
    assert row["training_seconds"] == 0  # nothing was trained
    assert row["inference_seconds_per_image"] == 0.5  # 3 s, 6 images


def test_a_detector_has_the_figures_of_its_own_evaluation(data: Path, tmp_path: Path) -> None:
    run = detector(tmp_path / "run", FOUND)
    (row,) = compare(data, run, resamples=50, seed=3)["rows"]
    options = {"data": data, "predictions": run, "out": tmp_path / "alone", "resamples": 50}
    evaluate.run(build(EvaluateConfig, {**options, "seed": 3, "published": False}))
    alone = read_json(tmp_path / "alone" / "metrics.json")
    decision = alone["image_decision"]["detector"]
    for key in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert row[key] == decision[key]
    assert (row["map50"], row["mask_iou"]) == (alone["box"]["map50"], alone["mask"]["mean_iou_all"])
    for key, theirs in {
        "map50": "box.map50",
        "mask_iou": "mask.mean_iou_all",
        "accuracy": "image_decision.detector.accuracy",
    }.items():
        assert row["intervals"][key] == alone["intervals"][theirs]


def test_a_detector_with_anomaly_scores_decides_by_both(data: Path, tmp_path: Path) -> None:
    """The good image 5 has a box of a defect, and no anomaly; as in its own evaluation."""
    found = [(i, c, box, 0.5 if i == 5 else score) for i, c, box, score in FOUND]
    alone, run = detector(tmp_path / "alone", found), detector(tmp_path / "run", found)
    scores = {1: 1.0, 2: 1.0, 3: 7.0, 4: 1.5, 5: 1.2, 6: 8.0, 7: 6.0}
    content = read_json(run / "images.json")
    for image in content["images"]:
        image["anomaly"] = {"score": scores[image["id"]], "threshold": 4.0}
    write_json(run / "images.json", content)
    boxes, both = compare(data, alone, run)["rows"]
    assert (boxes["method"], both["method"]) == ("YOLO-World + SAM", "YOLO-World + SAM + anomaly")
    assert (boxes["accuracy"], both["accuracy"]) == (0.75, 1)
    assert both["image_auroc"] == 1
    for key in ("map50", "mask_iou", "pixel_auroc"):
        assert both[key] == boxes[key]
    options = {"data": data, "predictions": run, "out": tmp_path / "own", "resamples": 0}
    evaluate.run(build(EvaluateConfig, {**options, "published": False}))
    own = read_json(tmp_path / "own" / "metrics.json")["image_decision"]["detector_with_anomaly"]
    assert own["accuracy"] == both["accuracy"]


def test_a_detector_that_finds_nothing(data: Path, tmp_path: Path) -> None:
    (row,) = compare(data, detector(tmp_path / "run", ()))["rows"]
    assert (row["image_auroc"], row["pixel_auroc"], row["map50"], row["mask_iou"]) == (
        0.5, 0.5, 0, 0,
    )  # fmt: skip
    assert (row["accuracy"], row["balanced_accuracy"]) == (0.5, pytest.approx(1 / 3, abs=1e-6))


def test_an_anomaly_detector_has_the_figures_of_its_own(data: Path, tmp_path: Path) -> None:
    splits = {**SPLITS, "train": [[]] * 4}
    data = write_dataset(tmp_path / "more" / "data", splits)
    values = {"source": data, "out": tmp_path / "run", "method": "cosine", "image_size": 64}
    detect_anomaly.run(build(DetectAnomalyConfig, values))
    alone = read_json(tmp_path / "run" / "metrics.json")
    (row,) = compare(data, tmp_path / "run")["rows"]
    for key in ("auroc", "pro", "iou"):
        ours = key if key == "pro" else f"pixel_{key}"
        assert row[ours] == alone["pixel"][key]
    assert row["image_auroc"] == alone["image"]["auroc"]
    for key in ("average_precision", "recall", "false_alarm_rate"):
        assert row[key] == alone["image"][key]
    assert row["training_seconds"] == alone["seconds"]["training"]


def test_gain_over_the_first_run(data: Path, tmp_path: Path) -> None:
    """Of the four test images, the detector is right about all, the classifier not about 6."""
    probabilities = {
        2: (0, 1, 0), 3: (0, 0.2, 0.8), 4: (0.1, 0.8, 0.1), 5: (0, 0.9, 0.1),
        6: (0.6, 0.1, 0.3), 7: (0.9, 0.1, 0),
    }  # fmt: skip
    runs = [
        classifier(tmp_path / "a", probabilities),
        detector(tmp_path / "b", FOUND),
        anomaly(tmp_path / "c", dict.fromkeys(range(2, 8), 0.0)),
    ]
    first, found, scores = compare(data, *runs, resamples=100, seed=5)["rows"]
    assert first["gain"] == {} and scores["gain"].keys() == {"image_auroc"}
    assert found["gain"].keys() == {"image_auroc", "accuracy", "balanced_accuracy", "macro_f1"}
    wrong = draw_resamples(4, 100, 5)[:, 2] / 4  # how often each draw has image 6
    low, high = np.percentile(wrong, [2.5, 97.5])
    assert found["gain"]["accuracy"] == {"value": 0.25, "interval": [low, high]}


def test_resampled_auroc_is_that_of_the_images_drawn() -> None:
    rng = np.random.default_rng(0)
    scores, defective = rng.integers(0, 5, 12).astype(float), np.arange(12) < 4
    counts = rng.multinomial(12, np.full(12, 1 / 12), 30)
    counts[0] = np.where(defective, 0, 2)  # no defect is drawn
    found = resampled_image_auroc(scores, defective, counts)
    assert np.isnan(found[0])
    for row, value in zip(counts[1:], found[1:], strict=True):
        drawn = np.repeat(np.arange(12), row)
        if 0 < defective[drawn].sum() < len(drawn):
            assert value == pytest.approx(roc_auc_score(defective[drawn], scores[drawn]))


# ---- All folds ---------------------------------------------------------------------------------


def test_folds_may_have_scales_of_their_own(data: Path, tmp_path: Path) -> None:
    """In each fold the order is right, though not of both together; decisions are pooled."""
    coco = read_json(data / "annotations" / "instances.json")
    halves = ([1, 2, 6], [3, 4, 5, 7])
    for k, tested in enumerate(halves):
        names = {"train": [], "val": [], "test": [name_of(i) for i in tested]}
        write_split(data, coco, names, data, k)
    anomaly(tmp_path / "fold0" / "run", {1: 1, 2: 2, 6: 3}, fold=0)
    anomaly(tmp_path / "fold1" / "run", {3: 700, 4: 500, 5: 600, 7: 550}, fold=1)
    values = compare(data, tmp_path / "fold{fold}" / "run", fold="all", resamples=200)
    (row,) = values["rows"]
    assert values["images"] == 7
    assert [fold["image_auroc"] for fold in row["per_fold"]] == [1, 3 / 4]
    assert [fold["fold"] for fold in row["per_fold"]] == [0, 1]
    assert row["image_auroc"] == 7 / 8
    low, high = row["intervals"]["image_auroc"]
    assert 0 <= low < 7 / 8 < high == 1
    assert row["recall"] is None  # no val split
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "mean over the folds" in text


# ---- The table, and the command ----------------------------------------------------------------


def test_the_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = {2: 0.1, 3: 0.3, 4: 0.15, 5: 0.6, 6: 0.5, 7: 0.9}
    runs = [anomaly(Path("a"), scores), anomaly(Path("b"), scores), detector(Path("c"), FOUND)]
    out = tmp_path / "out"
    cli.main(["evaluate", "--data", str(data), "--out", str(out), "--resamples", "20",
              *map(str, runs)])  # fmt: skip
    printed = capsys.readouterr().out
    text = (out / "comparison.md").read_text(encoding="utf-8")
    for shown in (printed, text):
        assert "cosine (a)" in shown and "cosine (b)" in shown
        assert "YOLO-World + SAM" in shown and "0.750" in shown
    lines = [line for line in text.splitlines() if line.startswith("| YOLO")]
    assert lines[0].split("|")[2].strip() == "boxes" and "–" not in lines[0]
    gains = text[text.index("## Gain over cosine (a)") :]
    assert "| cosine (b) | +0.00 (0.00 to 0.00) |" in gains and "cosine (a) |" not in gains
    made = read_json(out / "run.json")
    assert made["seconds"] >= 0 and {"runs[0]", "runs[1]", "runs[2]"} <= made["inputs"].keys()
    with pytest.raises(SystemExit):  # nothing is replaced unasked
        cli.main(["evaluate", "--data", str(data), "--out", str(out), str(runs[0])])
    # In its place, the evaluation of one run: neither leaves files of the other.
    cli.main(["evaluate", "--data", str(data), "--out", str(out), "--predictions", "c",
              "--resamples", "0", "--force"])  # fmt: skip
    assert not list(out.glob("comparison.*"))
    cli.main(["evaluate", "--data", str(data), "--out", str(out), "a", "--force"])
    assert not (out / "metrics.json").exists() and (out / "comparison.json").is_file()


def bad(what: str, data: Path, root: Path) -> tuple[list[str], str]:
    """Arguments, and the error they end in."""
    run = root / "run"
    scores = dict.fromkeys(range(2, 8), 0.0)
    kinds = "detect-anomaly, finetune-classifier, finetune-head, segment"
    if what == "nothing":
        return [], "--predictions: required without runs to compare, not given"
    if what == "no run":
        return [str(run)], f"{run}: expected a finished run of {kinds}, found no run.json there"
    if what == "other command":
        finish(run, "convert", None)
        return [str(run)], f"{run}/run.json: expected a run of {kinds}, found 'convert'"
    if what == "other fold":
        anomaly(run, scores, fold=1)
        return [str(run)], (
            f"{run}/config.yaml: expected a run of the dataset's single split, "
            "found one of the dataset's fold 1"
        )
    if what == "other images":
        anomaly(run, {2: 0.0, 3: 0.0, 4: 0.0})
        return [str(run)], (
            f"{run}/scores.json: image 5: expected good__004.png with 96x72 pixels, found none "
            "(and 2 more)"
        )
    if what == "other protocol":
        anomaly(run, scores, protocol="mvtec")
        return [str(run)], (
            f"{run}: expected a run on a dataset folder, found one on an MVTec category, whose own "
            "protocol has other splits"
        )
    if what == "other figures":
        anomaly(run, scores)
        write_json(run / "metrics.json", [])
        return [str(run)], (
            f"{run}/metrics.json: expected figures of `pipeline detect-anomaly`, found other JSON"
        )
    if what == "no heat map":
        anomaly(run, scores)
        path = run / "heatmaps" / name_of(3)
        path.unlink()
        return [str(run)], f"{path}: expected an image, found nothing there"
    if what == "true boxes":
        detector(run, FOUND, boxes="truth")
        return [str(run)], f"{run}: expected masks of a detector's boxes, found those of true ones"
    if what == "threshold":
        return [str(run), "--threshold", "0.5"], (
            "--threshold: expected none beside runs to compare, found 0.5"
        )
    assert what == "all folds"
    return [str(run), "--fold", "all"], (
        f"runs: expected a path with {{fold}} beside --fold all, found {run}"
    )


@pytest.mark.parametrize(
    "what",
    ["nothing", "no run", "other command", "other fold", "other images", "other protocol",
     "other figures", "no heat map", "true boxes", "threshold", "all folds"],
)  # fmt: skip
def test_bad_input(
    what: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = bad(what, data, tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--data", str(data), "--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"pipeline evaluate: {expected}\n"
    assert not (tmp_path / "out").exists()


# ---- What a detector was trained on ------------------------------------------------------------


@pytest.mark.parametrize(
    ("paste", "seconds", "needs", "total"),
    [(0.5, 100.0, "masks", 100.0), (0.0, 100.0, "boxes", 100.0), (0.0, None, "boxes", None)],
)
def test_trainings_are_followed(
    data: Path, tmp_path: Path, paste: float, seconds: float | None, needs: str, total: float | None
) -> None:
    trained = tmp_path / "detector"
    write_text(trained / "detector.pt", "weights")
    finish(trained, "finetune-yolo", None, {"seconds": seconds}, paste=paste, augment=True)
    run = detector(tmp_path / "run", FOUND, boxes=str(trained / "detector.pt"))
    (row,) = compare(data, run)["rows"]
    assert (row["needs"], row["training_seconds"]) == (needs, total)
    # Boxes of that run's file, with a segmenter that was trained as well.
    segmenter = tmp_path / "segmenter"
    write_text(segmenter / "sam.safetensors", "weights")
    finish(segmenter, "finetune-sam", None, {"seconds": 11.0})
    options = {"boxes": str(run / "predictions.json"), "sam": str(segmenter / "sam.safetensors")}
    again = detector(tmp_path / "again", FOUND, **options)
    (row,) = compare(data, again)["rows"]
    assert row["needs"] == "masks"
    assert row["training_seconds"] == (None if total is None else total + 11)


# ---- Damaged files -----------------------------------------------------------------------------

WRONG = (None, "x", float("nan"), -1, 2.5, True, [], {}, [1], {"a": 1})


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value and a key in it; of lists, the first item alone."""
    keys = list(value) if isinstance(value, dict) else range(len(value))[:1]
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


MAKE: dict[str, Callable[[Path], Path]] = {
    "--anomaly": lambda run: anomaly(run, dict.fromkeys(range(2, 8), 0.5)),
    "--classifiers": lambda run: classifier(run, dict.fromkeys(range(2, 8), (0.25, 0.5, 0.25))),
    "--predictions": lambda run: with_anomaly(detector(run, FOUND)),
}


def with_anomaly(run: Path) -> Path:
    """What `segment --anomaly` adds to the images."""
    coco = read_json(run / "images.json")
    for image in coco["images"]:
        image["anomaly"] = {"score": 0.5, "threshold": 0.25}
    write_json(run / "images.json", coco)
    return run


@pytest.mark.parametrize("compared", [True, False])
@pytest.mark.parametrize("flag", MAKE)
def test_damaged_files_end_in_lines(
    flag: str, compared: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in the place of any value: a result, or lines that name the file."""
    run = MAKE[flag](tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(json.dumps(read_yaml(config)))  # JSON is YAML
    command = ["evaluate", "--data", str(data), "--resamples", "0", "--out", str(tmp_path / "out")]
    if compared:
        command.append(str(run))
    elif flag == "--predictions":
        command += [flag, str(run)]
    else:
        command += ["--predictions", str(detector(tmp_path / "boxes", FOUND)), flag, str(run)]
    accepted, refused = 0, 0
    for path in (*run.glob("*.json"), config):
        content = [json.loads(path.read_text())]
        for container, key in places(content):
            right = container[key]
            for value in WRONG if compared else WRONG[:3]:  # an evaluation takes longer
                container[key] = value
                path.write_text(json.dumps(content[0]))
                capsys.readouterr()
                try:
                    cli.main([*command, "--force"])
                    accepted += 1
                except SystemExit as end:
                    lines = capsys.readouterr().err.splitlines()
                    assert end.code == 2 and lines, (path, key, value)
                    assert all(line.startswith("pipeline evaluate: ") for line in lines), lines
                    assert all(str(run) in line or "--anomaly" in line for line in lines), lines
                    refused += 1
            container[key] = right
        path.write_text(json.dumps(content[0]))
    assert refused > 20 and accepted > 0
