"""`pipeline report`: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import reported

from pipeline import cli, record
from pipeline.config import RunConfig, build
from pipeline.data.coco import write_split
from pipeline.data.files import read_json, sha256, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported.write_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A run of its own for each test."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def problems(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, arguments)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("pipeline report: ") for line in lines)
    return [line.removeprefix("pipeline report: ") for line in lines]


def data_of(index: Path) -> Any:
    text = index.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</scr")[0])


class Addresses(HTMLParser):
    """What a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "poster")]


# ---- What is written


def test_a_folder_that_needs_nothing_else(root: Path) -> None:
    out = reported.report(root, root / "page", "--video", str(root / "review.mp4"))
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    pictures = sorted(f"images/{i}.jpg" for i in range(3, 16))  # 1 and 2 are for training
    assert names == sorted(["config.yaml", "index.html", "review.mp4", "run.json", *pictures])
    text = (out / "index.html").read_text(encoding="utf-8")
    addresses = {a for a in Addresses(text).found if not a.startswith("#")}
    assert addresses == {"data:,", "review.mp4"}
    picture = cv2.imread(str(out / "images" / "6.jpg"))
    original = cv2.imread(str(root / "dataset" / "images" / "scratch__005.png"))
    grey = [cv2.cvtColor(one, cv2.COLOR_BGR2GRAY).astype(int) for one in (picture, original)]
    assert np.abs(grey[0] - grey[1]).mean() < 5  # its noise is smoother


def test_boxes_scores_and_run_lengths_are_those_on_disk(root: Path) -> None:
    out = reported.report(root, root / "page")
    data = data_of(out / "index.html")
    assert data["identity"] == sha256(root / "predictions" / "predictions.json")
    on_disk: dict[int, list[dict[str, Any]]] = {}
    for entry in read_json(root / "predictions" / "predictions.json"):
        on_disk.setdefault(entry["image_id"], []).append(entry)
    for image in data["images"]:
        expected = sorted(on_disk.get(image["id"], []), key=lambda e: -e["score"])
        found = [
            {key: one[key] for key in ("bbox", "score", "quality", "segmentation")}
            for one in image["predictions"]
        ]
        assert found == [{key: e[key] for key in found[0]} for e in expected]
    assert [i["part"] for i in data["images"]] == ["test"] * 10 + ["val"] * 3


def test_verdicts_and_finds_at_any_threshold(root: Path) -> None:
    images = data_of(reported.report(root, root / "page") / "index.html")["images"]
    hit, _, half, wrong = images[:4]
    # the box over the scratch has 0.9; from 0.12 on there is one that finds nothing
    assert hit["verdicts"] == [[None, "miss"], [0.9, "hit"], [0.12, "false alarm"]]
    assert hit["truth"][0]["score"] == 0.9
    # boxes of 20 x 12, moved by 2 and by 1 pixels: 18 x 11 in common
    assert hit["predictions"][0]["iou"] == pytest.approx(198 / 282, abs=1e-4)
    assert [one["score"] for one in half["truth"]] == [0.85, None]
    assert half["verdicts"] == [[None, "miss"]]
    assert wrong["verdicts"] == [[None, "miss"], [0.7, "wrong class"]]


def test_heat_maps_on_one_scale(root: Path) -> None:
    folder = reported.write_heat_maps(root)
    out = reported.report(root, root / "page", "--heat-maps", str(folder))
    first, second, *rest = data_of(out / "index.html")["images"]
    assert [one["heat"] for one in (first, second)] == ["images/heat-6.jpg", "images/heat-7.jpg"]
    assert {one["heat"] for one in rest} == {None}
    cool, hot = (cv2.imread(str(out / one["heat"])) for one in (first, second))
    assert cool.shape == hot.shape == (reported.HEIGHT, reported.WIDTH, 3)
    # Both from 0 to 9: the first map ends where the second has 1.
    at = round(reported.WIDTH / 9)
    assert np.abs(cool[:, -1].astype(int) - hot[:, at]).max() < 25
    assert hot[:, -1].mean() > 180 and hot[:, 0].mean() < 25


def test_heat_maps_of_other_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reported.write_heat_maps(root)
    scores = folder / "scores.json"
    given = ["--data", root / "dataset", "--predictions", root / "predictions", "--evaluation"]
    given += [root / "evaluation", "--out", root / "page", "--heat-maps", folder]
    right = scores.read_text()
    scores.write_text(right.replace("scratch__005.png", "scratch__050.png"))
    assert problems(capsys, *given) == [
        "--heat-maps: image 6: expected scratch__005.png with 96x72 pixels, "
        "found scratch__050.png with 96x72"
    ]
    scores.write_text(right.replace('"id": 6', '"id": 1').replace('"id": 7', '"id": 2'))
    assert problems(capsys, *given) == [
        f"--heat-maps: expected those of the shown images in {folder}, found none"
    ]
    assert not (root / "page").exists()


@pytest.mark.parametrize("where", ["predictions", "run", "another run"])
def test_anomaly_scores_of_the_predictions_or_of_the_run_that_was_evaluated(
    root: Path, where: str
) -> None:
    folder = reported.write_heat_maps(root)
    scored = read_json(folder / "scores.json")["images"][0]
    images = read_json(root / "predictions" / "images.json")
    write_json(
        folder / "scores.json",
        {"images": [{**scored, **i, "score": i["id"] / 2} for i in images["images"]]},
    )
    about = {"method": "cosine", "protocol": "dataset", "fold": None, "image": {"threshold": 7.5}}
    about |= {"seconds": {"training": 1, "inference_per_image": 0.1}}
    write_json(folder / "metrics.json", about)
    given = ["--data", root / "dataset", "--predictions", root / "predictions", "--resamples", 0]
    given += ["--threshold", 0.5, "--force", "--out", root / "evaluation"]
    if where == "predictions":
        for image in images["images"]:
            image["anomaly"] = {"score": image["id"] / 2, "threshold": 7.5}
        write_json(root / "predictions" / "images.json", images)
    else:
        given += ["--anomaly", folder]
    cli.main(["evaluate", *map(str, given)])
    shown = [] if where == "predictions" else ["--heat-maps", str(folder)]
    if where == "another run":
        write_json(folder / "metrics.json", {**about, "fold": 1})
    page = reported.report(root, root / "page", *shown) / "index.html"
    found = {image["id"]: image["anomaly"] for image in data_of(page)["images"]}
    known = where != "another run"
    assert found == {
        i["id"]: {"score": i["id"] / 2, "threshold": 7.5} if known else None
        for i in images["images"]
    }
    assert ('<option value="unknown">' in page.read_text()) == known
    assert "Images called defective" in page.read_text()


def test_large_images_are_reduced(root: Path) -> None:
    out = reported.report(root, root / "page", "--side", "48")
    assert cv2.imread(str(out / "images" / "6.jpg")).shape == (36, 48, 3)
    assert data_of(out / "index.html")["images"][0]["width"] == 96  # boxes stay in its pixels


def test_a_name_cannot_break_out_of_the_page(root: Path) -> None:
    title = """</script><script>alert("&")</script>"""
    data = root / "predictions" / "predictions.json"
    entries = json.loads(data.read_text())
    entries[0]["segmentation"]["note"] = "</script><b>"
    data.write_text(json.dumps(entries))
    reported.evaluate(root, root / "evaluation2", 0.5)
    given = ["--data", root / "dataset", "--predictions", root / "predictions"]
    given += ["--evaluation", root / "evaluation2", "--out", root / "page", "--title", title]
    cli.main(["report", *map(str, given)])
    text = (root / "page" / "index.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "&lt;/script&gt;" in text
    assert data_of(root / "page" / "index.html")["images"]


def test_without_masks_and_without_a_video(root: Path) -> None:
    data = root / "predictions" / "predictions.json"
    entries = [
        {k: v for k, v in e.items() if k not in ("segmentation", "quality")}
        for e in json.loads(data.read_text())
    ]
    data.write_text(json.dumps(entries))
    shutil.rmtree(root / "evaluation")
    reported.evaluate(root, root / "evaluation", 0.5)
    text = (reported.report(root, root / "page") / "index.html").read_text(encoding="utf-8")
    assert "<video" not in text
    assert "Precision and recall, boxes" in text
    assert "Precision and recall, masks" not in text and "Calibration" not in text


def test_the_same_input_gives_the_same_page(root: Path) -> None:
    first, second = (reported.report(root, root / name, "--title", "t") for name in "ab")
    assert (first / "index.html").read_bytes() == (second / "index.html").read_bytes()


def test_it_is_written_again_only_by_force(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = reported.report(root, root / "page", "--video", str(root / "review.mp4"))
    given = ["--data", root / "dataset", "--predictions", root / "predictions"]
    given += ["--evaluation", root / "evaluation", "--out", out]
    (line,) = problems(capsys, *given)
    assert line == f"--out: {out} holds a finished result; give --force to replace it"
    cli.main(["report", *map(str, given), "--force", "--single-file"])
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "index.html", "run.json"]


# ---- Moments


def test_the_videos_moments_show_their_images(tmp_path: Path) -> None:
    """Images of one grey each: what is on the screen at an image's moment is that image."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    greys = {f"{i:03}.png": 20 + 25 * i for i in range(8)}
    images = []
    for number, (name, grey) in enumerate(greys.items(), start=1):
        cv2.imwrite(str(folder / name), np.full((64, 64, 3), grey, np.uint8))
        images.append({"id": number, "file_name": name, "width": 64, "height": 64})
    coco = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "dent"}]}
    (tmp_path / "data" / "truth.json").write_text(json.dumps(coco))
    video = tmp_path / "review.mp4"
    pace = ["--seconds-per-image", "0.7", "--fps", "7", "--title-seconds", "1", "--height", "64"]
    source = ["--source", str(tmp_path / "data" / "truth.json"), "--images", str(folder)]
    cli.main(["overlay", *source, *pace, "--layout", "truth", "--out", str(video)])
    moments = read_json(record.record_path(video))["moments"]
    assert [moment["file_name"] for moment in moments] == list(greys)
    assert moments[0]["seconds"] == pytest.approx(7 / 7 + 0.5 / 7, abs=1e-3)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = [
            (float(f.pts * stream.time_base), f.to_ndarray(format="gray"))
            for f in container.decode(stream)
        ]
    for moment in moments:
        start, frame = [(t, f) for t, f in frames if t <= moment["seconds"]][-1]
        assert moment["seconds"] - start < 1 / 7
        values, counts = np.unique(frame, return_counts=True)
        middle = [v for v in (greys[moment["file_name"]] + d for d in range(-4, 5)) if v in values]
        assert counts[np.isin(values, middle)].sum() > 2000, moment  # of 64 x 64 pixels


# ---- A run's folder


def write_config(root: Path, **options: Any) -> RunConfig:
    config = build(RunConfig, {"out": root, "synth": {}, **options})
    record.write_config(root, "run", config)
    return config


def test_of_a_runs_folder_wherever_it_is_now(root: Path, tmp_path: Path) -> None:
    write_config(root, report={"title": "Transistors"})
    moved = root.rename(tmp_path / "moved")
    cli.main(["report", str(moved)])
    index = moved / "report" / "index.html"
    assert "<title>Transistors" in index.read_text(encoding="utf-8")
    assert data_of(index)["images"][0]["moment"] is not None
    cli.main(["report", str(moved), "--out", str(tmp_path / "other"), "--title", "Other"])
    assert "<title>Other" in (tmp_path / "other" / "index.html").read_text(encoding="utf-8")


def write_folds(root: Path) -> None:
    """Two folds that test each half of all images; each has a model of its own."""
    coco = read_json(root / "dataset" / "annotations" / "instances.json")
    names = [image["file_name"] for image in coco["images"]]
    halves = [names[0::2], names[1::2]]
    for fold in (0, 1):
        split = {"train": [], "val": halves[1 - fold], "test": halves[fold]}
        write_split(root / "dataset", coco, split, root / "dataset", fold)
        folder = root / f"fold{fold}" / "predictions"
        shutil.copytree(root / "predictions", folder)
        (folder / "images.json").write_text(json.dumps({**coco, "annotations": []}))


def test_of_one_fold_and_of_all(root: Path) -> None:
    write_folds(root)
    shutil.rmtree(root / "evaluation")
    (root / "review.mp4").unlink()
    (root / "review.mp4.json").rename(root / "fold1" / "review.mp4.json")  # no video was made
    predictions = str(root / "fold{fold}" / "predictions")
    common = ["--data", str(root / "dataset"), "--resamples", "0", "--predictions"]
    one = root / "fold1"
    cli.main(
        [
            "evaluate",
            *common,
            str(one / "predictions"),
            "--fold",
            "1",
            "--out",
            str(one / "evaluation"),
        ]
    )
    write_config(root, fold=1, convert={"folds": 2})
    cli.main(["report", str(root)])
    data = data_of(one / "report" / "index.html")
    assert {image["part"] for image in data["images"]} == {"test", "val"}
    text = (one / "report" / "index.html").read_text(encoding="utf-8")
    assert "<title>run, fold 1" in text

    cli.main(["evaluate", *common, predictions, "--fold", "all", "--out", str(root / "evaluation")])
    (one / "review.mp4.json").rename(root / "review.mp4.json")
    write_config(root, fold="all", convert={"folds": 2})
    cli.main(["report", str(root)])
    data = data_of(root / "report" / "index.html")
    assert sorted(image["id"] for image in data["images"]) == list(range(1, 16))
    assert {image["part"] for image in data["images"]} == {"fold 0", "fold 1"}
    folds = read_json(root / "evaluation" / "metrics.json")["folds"]
    expected = {f"fold {fold['fold']}": fold["threshold"]["value"] for fold in folds}
    assert {image["part"]: image["threshold"] for image in data["images"]} == expected


# ---- What made it


def test_what_made_it_is_traced_back_to_the_weights(root: Path) -> None:
    trained, weights = root / "detector", root / "detector" / "detector.pt"
    trained.mkdir()
    weights.write_bytes(b"weights")
    made = {"command": "finetune-yolo", "signature": "1", "inputs": {"model": known().sha256}}
    (trained / "run.json").write_text(json.dumps({**made, "seconds": 61.2}))
    (trained / "config.yaml").write_text(f"model: {known().name}\nepochs: 8\n")
    found = {"boxes": sha256(weights), "sam": "f" * 64}
    made = {"command": "segment", "signature": "2", "inputs": found}
    (root / "predictions" / "run.json").write_text(json.dumps(made))
    (root / "predictions" / "config.yaml").write_text(f"boxes: {weights}\nsam: some-sam\n")
    shutil.rmtree(root / "evaluation")
    reported.evaluate(root, root / "evaluation", 0.5)
    text = (reported.report(root, root / "page") / "index.html").read_text(encoding="utf-8")
    section = text[text.index('id="made"') :]
    for words in (sha256(weights), "f" * 64, known().sha256, known().licence, "61 s"):
        assert words in section
    assert section.index("pipeline finetune-yolo") < section.index("pipeline segment")
    assert "&#34;epochs&#34;: 8" in section
    assert record.versions()["packages"]["torch"] in section


def known() -> Any:
    return record.load_registry()["yolo-world-n"]


# ---- Bad input


def test_what_is_missing_or_too_much(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(capsys) == [
        f"--{name}: required without a run, not given"
        for name in ("data", "predictions", "evaluation", "out")
    ]
    (line,) = problems(capsys, root)
    expected = f"found no config.yaml in {root}"
    assert line == f"run: expected an output folder of `pipeline run`, {expected}"
    (line,) = problems(capsys, root / "evaluation")
    assert line == f"run: expected an output folder of `pipeline run`, found {root / 'evaluation'}"
    write_config(root)
    (line,) = problems(capsys, root, "--data", root / "dataset", "--video", root / "review.mp4")
    assert line == "run: expected none of its inputs beside it, found --data, --video"


def test_what_does_not_fit_together(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "data": root / "dataset",
        "predictions": root / "predictions",
        "evaluation": root / "evaluation",
        "out": root / "page",
    }

    def found(**changes: Path) -> str:
        options = {**given, **changes}
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        (line,) = problems(capsys, *flags)
        return line

    absent = root / "absent"
    assert found(evaluation=absent).startswith(f"{absent / 'metrics.json'}: expected a JSON file")
    assert found(predictions=absent) == f"--predictions: expected a folder, found none at {absent}"
    other = shutil.copytree(root / "predictions", root / "other")
    (other / "predictions.json").write_text("[]")
    measured = f"expected what {root / 'evaluation'} measured"
    assert found(predictions=other) == f"--predictions: {measured}, found other: {other}"
    assert found(data=other) == f"--data: {measured}, found other: {other}"
    assert found(video=absent) == (
        f"--video: expected a file ending in .mp4 or .webm, found {absent}"
    )
    video = root / "absent.mp4"
    assert found(video=video) == f"--video: expected a video, found nothing at {video}"
    (root / "broken.mp4").write_bytes(b"no video")
    assert found(video=root / "broken.mp4").startswith(
        f"{root / 'broken.mp4'}: expected a video, found"
    )
    (root / "notes.txt").write_text("mine")
    assert found(out=root) == f"--out: expected a place apart from --data, found {root}"
    assert not (root / "page" / "index.html").exists()


def test_an_image_that_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = root / "dataset" / "images" / "scratch__005.png"
    image.write_bytes(b"no image")
    shutil.rmtree(root / "evaluation")
    reported.evaluate(root, root / "evaluation", 0.5)
    given = ["--data", root / "dataset", "--predictions", root / "predictions"]
    (line,) = problems(capsys, *given, "--evaluation", root / "evaluation", "--out", root / "page")
    assert line == f"{image}: expected an image, found a file that cannot be decoded"
    assert not (root / "page" / "run.json").exists()
