"""`pipeline finetune-yolo`: small real trainings, watched from outside."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mvtec_tree import write, write_tree

from pipeline import record
from pipeline.config import ConvertConfig, FinetuneYoloConfig
from pipeline.data.augment import vary_light
from pipeline.data.dataset import Dataset, Sample
from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError
from pipeline.models import text, yolo_world
from pipeline.models.yolo_trainer import BalancedSampler, PromptTrainer, few_shot
from pipeline.stages import convert, finetune_yolo

# Ultralytics is imported after our modules, which keep it to themselves.
from ultralytics.data import base as ultralytics_base  # isort: skip
from ultralytics.engine import trainer as ultralytics_trainer  # isort: skip

CLASSES = ("bright_spot", "dark_spot")
SIDE = 64  # of what the network sees; the images are 64 x 48
SCRATCH = "yolov8n-worldv2.yaml"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a rectangle, bright in one class and dark in the other; and without."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for cls, level in (("good", None), ("bright_spot", 250), ("dark_spot", 5)):
        for i in range(8):
            picture = rng.integers(115, 125, (48, 64, 3), np.uint8)
            mask = np.zeros((48, 64), np.uint8)
            if level is not None:
                x, y, width, height = rng.integers((6, 6, 12, 10), (34, 26, 24, 16))
                for canvas, value in ((picture, level), (mask, 255)):
                    canvas[y : y + height, x : x + width] = value
                write(root / "spots" / "ground_truth" / cls / f"{i:03}_mask.png", mask)
            folder = "train/good" if level is None else f"test/{cls}"
            write(root / "spots" / folder / f"{i:03}.png", picture)
    return converted(root / "spots", root / "converted", (0.5, 0.25, 0.25))


def converted(source: Path, out: Path, fractions: tuple[float, float, float]) -> Path:
    given = {"source": source, "out": out, "fractions": fractions}
    convert.run(ConvertConfig.model_validate(given))
    return out


def options(dataset: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "data": str(dataset),
        "out": str(out),
        "model": SCRATCH,
        "text": "learned",
        "epochs": 3,
        "batch": 4,
        "image_size": SIDE,
        "device": "cpu",
        "offline": True,
    }
    return given | changes


def config(dataset: Path, out: Path, **changes: Any) -> FinetuneYoloConfig:
    return FinetuneYoloConfig.model_validate(options(dataset, out, **changes))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
    }


def epochs_in(results: Path) -> list[int]:
    with results.open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    model = torch.load(path, weights_only=False)["model"]
    return {**model.state_dict(), "txt_feats": model.txt_feats}


def equal(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---------------------------------------------------------------- one whole training, from outside

# Notes every connection, started process and file opened for writing; refuses connections.
WATCHED = """
import json, os, sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        seen.append([event, repr(args[1:])])
        raise OSError("no network")
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        seen.append([event, repr(args)])
    if event == "open" and isinstance(args[0], (str, bytes)) and (
        any(c in (args[1] or "") for c in "wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    ):
        seen.append([event, os.path.abspath(os.fsdecode(args[0]))])
sys.addaudithook(watch)
from pipeline.cli import main
main(["finetune-yolo", "--config", sys.argv[1]])
report = json.dumps(seen)
with open(sys.argv[2], "w") as file:
    file.write(report)
"""


class Finished:
    """A run of three epochs in a process of its own, with a home of its own."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.out = folder / "out"
        self.dataset = dataset
        self.home, self.here, self.temporary = (folder / name for name in ("home", "here", "tmp"))
        for place in (self.home, self.here, self.temporary):
            place.mkdir()
        yaml_file, seen = folder / "config.yaml", folder / "seen.json"
        yaml_file.write_text(yaml.safe_dump(options(dataset, self.out)))
        private = ("YOLO", "XDG", "PIPELINE", "MPL", "ULTRALYTICS", "TORCH", "PYTEST")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(private)}
        environment |= {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.dataset_before = snapshot(dataset)
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, str(yaml_file), str(seen)],
            cwd=self.here, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.log = done.stdout + done.stderr
        self.seen: list[tuple[str, str]] = [tuple(pair) for pair in json.loads(seen.read_text())]
        self.detector = self.out / "detector.pt"


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), dataset)


def test_safetensors_hold_the_same_model(finished: Finished) -> None:
    model = yolo_world.load_model(str(finished.detector)).state_dict()
    copy = yolo_world.load_model(str(finished.detector.with_suffix(".safetensors"))).state_dict()
    assert model.keys() == copy.keys()
    assert all(torch.allclose(model[key].float(), copy[key].float(), atol=1e-3) for key in model)


def test_output(finished: Finished) -> None:
    assert not (finished.out / "weights").exists(), "what serves to resume"
    assert epochs_in(finished.out / "results.csv") == [1, 2, 3]
    for name in ("results.png", "BoxPR_curve.png", "confusion_matrix.png", "train_batch0.jpg"):
        assert cv2.imread(str(finished.out / name)) is not None, name
    written = yaml.safe_load((finished.out / "config.yaml").read_text())
    assert {key: written[key] for key in options(finished.dataset, finished.out)} == options(
        finished.dataset, finished.out
    )
    assert read_json(finished.out / "run.json")["command"] == "finetune-yolo"
    assert not list(finished.out.rglob(".*"))


def test_prompts_are_printed_and_recorded(finished: Finished) -> None:
    assert "prompts: learned\n" in finished.log
    assert yaml.safe_load((finished.out / "prompts.yaml").read_text()) == {
        "embeddings": "learned",
        "texts": {"bright_spot": "bright spot", "dark_spot": "dark spot"},
    }


def test_log_tells_the_progress_and_no_more(finished: Finished) -> None:
    assert all(f"{epoch}/3" in finished.log for epoch in (1, 2, 3))
    noise = ("Settings", "agnostic_nms", "requires_grad", "WARNING", "albumentations", "AdamW")
    assert [word for word in noise if word in finished.log] == []
    assert finished.log.count("\n") < 60  # also of what bars leave in a file


def test_no_connection_and_no_installation(finished: Finished) -> None:
    assert [s for s in finished.seen if s[0].startswith("socket")] == []
    started = [what for event, what in finished.seen if event not in ("open", "socket.connect")]
    assert [what for what in started if "'pip'" in what or "install" in what] == []


def test_nothing_is_written_elsewhere(finished: Finished) -> None:
    places = (str(finished.out), str(finished.temporary), "/dev/", "/proc/")
    assert [path for event, path in finished.seen if event == "open"]  # the hook works
    assert [p for event, p in finished.seen if event == "open" and not p.startswith(places)] == []
    assert snapshot(finished.dataset) == finished.dataset_before
    assert [snapshot(p) for p in (finished.home, finished.here, finished.temporary)] == [{}] * 3


# Loads a checkpoint as anyone would who has Ultralytics and not this package.
FOREIGN = """
import json, socket, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pipeline":
            raise ModuleNotFoundError(name)
def refuse(*arguments):
    raise OSError("no network")
sys.meta_path.insert(0, Absent())
socket.socket.connect = refuse
from ultralytics import YOLOWorld
from ultralytics.nn.tasks import WorldModel
detector = YOLOWorld(sys.argv[1])
assert type(detector.model) is WorldModel
found = detector.predict(
    sys.argv[2], conf=float(sys.argv[3]), iou=float(sys.argv[4]), max_det=9, imgsz=int(sys.argv[5]),
    device="cpu", verbose=False,
)[0]
assert "pipeline" not in sys.modules
print(json.dumps([found.names, found.boxes.data.tolist()]))
"""


def test_detector_is_a_plain_checkpoint(finished: Finished, tmp_path: Path) -> None:
    sample = Dataset(finished.dataset).split("test")[0]
    scene = cv2.resize(sample.image(), (150, 100))  # to be scaled and padded
    cv2.imwrite(str(tmp_path / "scene.png"), scene)
    detector = yolo_world.Detector(
        yolo_world.load_model(str(finished.detector)), None, torch.device("cpu")
    )
    assert detector.image_size == SIDE
    found = detector.detect(scene, min_score=1e-9, max_boxes=9)
    assert len(found) > 2
    arguments = [finished.detector, tmp_path / "scene.png", 1e-9, yolo_world.NMS_IOU, SIDE]
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, *map(str, arguments)],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env={**os.environ, "YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1",
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names, boxes = json.loads(done.stdout.splitlines()[-1])
    assert names == {"0": "bright_spot", "1": "dark_spot"}
    assert found.confidence is not None and found.class_id is not None
    ours = np.column_stack([found.xyxy, found.confidence, found.class_id])
    np.testing.assert_allclose(ours, boxes, rtol=1e-4, atol=0.01)


def test_prompts_were_trained(finished: Finished) -> None:
    start = yolo_world.set_prompts(yolo_world.load_model(SCRATCH), CLASSES, None, seed=0)
    assert tensors(finished.detector)["txt_feats"].shape == (1, 2, 512)
    assert (tensors(finished.detector)["txt_feats"].float() - start.txt_feats).abs().max() > 1e-4


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of these small trainings."""

    def trainer(overrides: dict[str, Any]) -> PromptTrainer:
        return PromptTrainer(overrides=overrides | {"plots": False})

    monkeypatch.setattr(finetune_yolo, "PromptTrainer", trainer)


@pytest.mark.usefixtures("no_plots")
def test_same_seed_same_weights(finished: Finished, tmp_path: Path) -> None:
    finetune_yolo.run(config(finished.dataset, tmp_path / "same"))
    assert equal(tmp_path / "same" / "detector.pt", finished.detector)


@pytest.mark.usefixtures("no_plots")
def test_another_seed_is_another_training(finished: Finished, tmp_path: Path) -> None:
    """And one that starts from a trained checkpoint, without augmentation, without warnings."""
    out = tmp_path / "other"
    changes = {"model": str(finished.detector), "seed": 1, "epochs": 1, "augment": False}
    finetune_yolo.run(config(finished.dataset, out, **changes))
    assert epochs_in(out / "results.csv") == [1]
    assert not equal(out / "detector.pt", finished.detector)


# ---------------------------------------------------------------- interrupted and resumed


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def dies(function: Callable[..., Any], *, at: int, after: bool = False) -> Callable[..., Any]:
    """The function, which dies before (or after) its work when it is called for the n-th time."""
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise Killed
        result = function(*args, **kwargs)
        if calls == at:
            raise Killed
        return result

    return dying


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("owner", "name", "at", "after", "same_weights"),
    [
        (PromptTrainer, "save_model", 1, True, False),  # between two epochs
        (PromptTrainer, "save_model", 2, False, False),  # in the log, but not saved
        (PromptTrainer, "final_eval", 1, False, True),  # trained, but not finished
        (yolo_world, "save_safetensors", 1, False, True),  # with a detector.pt
    ],
)
def test_resume_after_a_kill(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    at: int,
    after: bool,
    same_weights: bool,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(owner, name, dies(getattr(owner, name), at=at, after=after))
        finetune_yolo.run(config(finished.dataset, out))
    assert (out / "weights" / "last.pt").is_file()
    assert not (out / "run.json").exists()
    with pytest.raises(UserError, match=r"^--resume: expected the options .* found others"):
        finetune_yolo.run(config(finished.dataset, out, resume=True, epochs=4))
    resumed = config(finished.dataset, out, resume=True)
    assert record.can_resume("finetune-yolo", resumed)
    finetune_yolo.run(resumed)
    assert epochs_in(out / "results.csv") == [1, 2, 3]
    assert not (out / "weights").exists()
    assert (out / "run.json").is_file()
    model = torch.load(out / "detector.pt", weights_only=False)["model"]
    assert type(model) is yolo_world.WorldModel
    assert equal(out / "detector.pt", finished.detector) == same_weights
    assert (out / "results.png").is_file() == same_weights  # others were told to make no plots


def test_checkpoints_are_never_half_written(tmp_path: Path) -> None:
    """Whatever dies while they are written, those of the epoch before stay."""
    trainer: Any = PromptTrainer.__new__(PromptTrainer)
    trainer.last, trainer.best = tmp_path / "last.pt", tmp_path / "best.pt"
    for path in (trainer.last, trainer.best):
        path.write_bytes(b"whole")

    def half(self: Any) -> None:
        self.last.write_bytes(b"ha")
        raise Killed

    with pytest.MonkeyPatch.context() as context, pytest.raises(Killed):
        context.setattr(ultralytics_trainer.BaseTrainer, "save_model", half)
        trainer.save_model()
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "best.pt").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "expected an interrupted run, found that .* is done"),
        ({"out": "elsewhere"}, "expected a checkpoint at elsewhere"),
    ],
)
def test_resume_refuses(finished: Finished, changes: dict[str, Any], problem: str) -> None:
    before = snapshot(finished.out)
    with pytest.raises(UserError, match=rf"^--resume: .*{problem}"):
        given = options(finished.dataset, finished.out, resume=True) | changes
        finetune_yolo.run(FinetuneYoloConfig.model_validate(given))
    assert snapshot(finished.out) == before


# ---------------------------------------------------------------- bad input, prompts


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


class Stop(Exception):
    """Ends a run where training would begin."""


def begin(monkeypatch: pytest.MonkeyPatch, given: FinetuneYoloConfig) -> dict[str, Any]:
    """Go as far as the training, and return what it would be given."""
    handed: dict[str, Any] = {}

    def trainer(overrides: dict[str, Any]) -> None:
        handed.update(overrides)
        raise Stop

    with monkeypatch.context() as context, pytest.raises(Stop):
        context.setattr(finetune_yolo, "PromptTrainer", trainer)
        finetune_yolo.run(given)
    return handed


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


# ---------------------------------------------------------------- what the network is shown


def shown(
    dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch, mode: str, **changes: Any
) -> Any:
    """The data set of the training, as the trainer builds it."""
    trainer = PromptTrainer(overrides=begin(monkeypatch, config(dataset, out, **changes)))
    return trainer.build_dataset("", mode, batch=4)


def test_labels_are_the_coco_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of awkward images: grey, 16 bit, many formats and shapes, several instances or one pixel."""
    root = converted(write_tree(tmp_path / "widget"), tmp_path / "data", (0.5, 0.5, 0.0))
    counts = []
    for mode in ("train", "val"):
        coco = read_json(root / "annotations" / f"instances_{mode}.json")
        dataset = shown(root, tmp_path / mode, monkeypatch, mode, augment=False)
        assert len(dataset) == len(coco["images"]) > 0
        for index, entry in enumerate(coco["images"]):
            label = dataset.labels[index]
            assert Path(label["im_file"]).name == entry["file_name"]
            truth = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
            size = np.array([entry["width"], entry["height"]] * 2)
            boxes = label["bboxes"] * size
            boxes[:, :2] -= boxes[:, 2:] / 2
            np.testing.assert_allclose(
                boxes, np.array([a["bbox"] for a in truth]).reshape(-1, 4), atol=1e-4
            )
            assert label["cls"].ravel().tolist() == [a["category_id"] - 1 for a in truth]
            pixels = dataset.load_image(index)[0]
            picture = Dataset(root).split(mode)[index].image()
            expected = cv2.resize(picture, pixels.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            assert np.array_equal(pixels, expected), entry["file_name"]
            counts.append(len(truth))
    assert 0 in counts and 1 in counts and 2 in counts
    assert not list(root.rglob("*.cache"))


@pytest.mark.usefixtures("no_plots")
def test_a_class_without_training_images_is_left_out(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dark spots are known as class 0 then, and images of the other class are not shown as good."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    train = data / "annotations" / "instances_train.json"
    coco = read_json(train)
    bright = {a["image_id"] for a in coco["annotations"] if a["category_id"] == 1}
    for key, name in (("images", "id"), ("annotations", "image_id")):
        coco[key] = [entry for entry in coco[key] if entry[name] not in bright]
    write_json(train, coco)

    given = config(data, tmp_path / "out", epochs=1, prompts={"bright_spot": "light"})
    finetune_yolo.run(given)
    assert "left out, for the training images show none: bright_spot\n" in capsys.readouterr().out
    model = torch.load(tmp_path / "out" / "detector.pt", weights_only=False)["model"]
    assert model.names == {0: "dark_spot"}
    assert yaml.safe_load((tmp_path / "out" / "prompts.yaml").read_text())["texts"] == {
        "dark_spot": "dark spot"
    }
    options = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())
    trainer = PromptTrainer(
        overrides={
            "model": SCRATCH,
            "data": str(tmp_path / "out" / "data.yaml"),
            "save_dir": str(tmp_path / "trainer"),
            "imgsz": SIDE,
        }
    )
    assert options["names"] == {0: "dark_spot"}
    shown = trainer.build_dataset("", "val", batch=4)
    assert sorted(Path(label["im_file"]).name.split("__")[0] for label in shown.labels) == [
        *["dark_spot"] * 2,
        *["good"] * 2,
    ]
    assert all((label["cls"] == 0).all() for label in shown.labels)


def test_without_any_defect_to_learn_there_is_no_training(dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    train = data / "annotations" / "instances_train.json"
    write_json(train, {**read_json(train), "annotations": []})
    with pytest.raises(UserError, match=r"expected defects in the train split of .*found none"):
        finetune_yolo.run(config(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["train", "val"])
def test_without_augmentation_images_are_only_padded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    samples = Dataset(dataset).split(mode)
    for item, sample in zip(
        shown(dataset, tmp_path, monkeypatch, mode, augment=False), samples, strict=True
    ):
        picture = item["img"].numpy()[::-1].transpose(1, 2, 0)  # RGB (3, h, w) to BGR (h, w, 3)
        assert np.array_equal(picture[8:56], sample.image())
        assert (picture[:8] == 114).all() and (picture[56:] == 114).all()
        expected = np.array([a["bbox"] for a in sample.annotations]).reshape(-1, 4)
        np.testing.assert_allclose(pixel_boxes(item) - [0, 8, 0, 0], expected, atol=1e-3)


def pixel_boxes(item: dict[str, Any]) -> np.ndarray:
    """(n, 4): left, top, width and height."""
    boxes = item["bboxes"].numpy() * SIDE
    boxes[:, :2] -= boxes[:, 2:] / 2
    return boxes


def test_augmentation_keeps_boxes_and_classes_in_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = shown(dataset, tmp_path, monkeypatch, "train")
    drawn = 0
    changed = 0
    for _ in range(15):
        for item, sample in zip(items, Dataset(dataset).split("train"), strict=True):
            picture = item["img"].numpy().transpose(1, 2, 0)
            grey = cv2.medianBlur(picture.mean(2).astype(np.uint8), 3).astype(int)
            changed += not np.array_equal(picture[8:56, :, ::-1], sample.image())
            contrast = grey - np.median(grey)
            for box, cls in zip(pixel_boxes(item), item["cls"].ravel().tolist(), strict=True):
                if min(box[2:]) < 5:
                    continue  # a sliver at the border, which the blur may remove
                spot = (contrast > 30) if cls == 0 else (contrast < -30)
                _count, components = cv2.connectedComponents(spot.astype(np.uint8))
                x, y, w, h = box.round().astype(int)
                inside = components[y : y + h, x : x + w]
                inside = inside[inside > 0]
                assert len(inside), "the box holds a spot of its class"
                rows, columns = np.nonzero(components == np.bincount(inside).argmax())
                left, top = columns.min(), rows.min()
                extent = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
                assert np.abs(gaps(extent, box)).max() <= 2, (box, extent)
                drawn += 1
    assert drawn > 100
    assert changed > 150  # of 180


def gaps(a: Any, b: Any) -> np.ndarray:
    """Distances between the four sides of two boxes, each left, top, width, height."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    return np.array([ax - bx, ay - by, ax + aw - bx - bw, ay + ah - by - bh])


def test_augmentation_is_seeded(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = (
        torch.stack([x["img"] for x in shown(dataset, tmp_path / n, monkeypatch, "train", seed=s)])
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_light_varies_by_the_generator_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    varied = [vary_light(picture, np.random.default_rng(seed)) for seed in range(300)]
    again = [vary_light(picture, np.random.default_rng(seed)) for seed in range(300)]
    assert all(np.array_equal(a, b) for a, b in zip(varied, again, strict=True))
    assert all(v.shape == picture.shape and v.dtype == np.uint8 for v in varied)
    unchanged = sum(np.array_equal(v, picture) for v in varied)
    assert 30 < unchanged < 80  # 300 * 0.5 * 0.7 * 0.8**3 = 54, if each is drawn by itself


# ---------------------------------------------------------------- pasted defects, balanced epochs


def test_defects_are_pasted_on_good_training_images_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come with labels: the boxes hold what differs from the good image."""
    changes = {"paste": 1.0, "free_pose": True}
    items = shown(dataset, tmp_path / "a", monkeypatch, "train", **changes)
    pasted = 0
    for index, sample in enumerate(Dataset(dataset).split("train")):
        before, label = sample.image(), items.get_image_and_label(index)
        if sample.annotations:
            assert np.array_equal(label["img"], before)
            assert len(label["cls"]) == len(sample.annotations)
            continue
        assert np.array_equal(items.load_image(index)[0], before), "the cache stays as it is"
        boxes = label["instances"].bboxes * [64, 48, 64, 48]
        for (x, y, width, height), cls in zip(boxes, label["cls"].ravel(), strict=True):
            left, top = round(x - width / 2), round(y - height / 2)
            grey = label["img"].mean(axis=2)
            spot = grey > 185 if cls == 0 else grey < 60
            inside = np.zeros_like(spot)
            inside[top : top + round(height), left : left + round(width)] = True
            _, found = cv2.connectedComponents((spot & inside).astype(np.uint8))
            assert np.abs(gaps(cv2.boundingRect((found > 0).astype(np.uint8)),
                               (left, top, width, height))).max() <= 2  # fmt: skip
            pasted += 1
    assert pasted >= 3


def test_only_training_images_are_cut(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Dataset(dataset).split("train")
    opened: list[str] = []
    imread = ultralytics_base.imread

    def watch(path: str, *rest: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return imread(path, *rest, **options)

    monkeypatch.setattr(ultralytics_base, "imread", watch)
    items = shown(dataset, tmp_path / "a", monkeypatch, "train", paste=0.5)
    assert set(opened) == {sample.path.name for sample in samples}
    assert len(items._cuttings) == sum(len(sample.annotations) for sample in samples) > 0


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("val", {"paste": 1.0}), ("train", {"paste": 0.0}), ("train", {"augment": False})],
)
def test_nothing_is_pasted_on_what_is_measured_or_unless_asked(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    changes: dict[str, Any],
) -> None:
    items = shown(dataset, tmp_path, monkeypatch, mode, **changes)
    for index, sample in enumerate(Dataset(dataset).split(mode)):
        for _ in range(3):
            label = items.get_image_and_label(index)
            assert np.array_equal(label["img"], sample.image())
            assert len(label["cls"]) == len(sample.annotations)


LABELS = [-1] * 31 + [0] * 3 + [1] * 5 + [-1] * 10 + [2]  # 50 images


@given(defective=st.floats(0.05, 0.95), seed=st.integers(0, 9), epochs=st.integers(1, 40))
@settings(max_examples=40)
def test_epochs_are_balanced(defective: float, seed: int, epochs: int) -> None:
    sampler = BalancedSampler(LABELS, defective, seed)
    counts = np.zeros(len(LABELS), int)
    for _ in range(epochs):
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == len(LABELS)
        assert sum(LABELS[i] >= 0 for i in drawn) == round(defective * len(LABELS))
        np.add.at(counts, drawn, 1)
    labels = np.array(LABELS)
    for label in (-1, 0, 1, 2):  # an image as often as any other of its class
        assert np.ptp(counts[labels == label]) <= 1
    assert np.ptp([counts[labels == label].sum() for label in (0, 1, 2)]) <= 1


@given(defective=st.floats(0.05, 0.95), seed=st.integers(0, 9), epochs=st.integers(1, 40))
@settings(max_examples=15)
def test_good_images_with_hard_negatives_are_shown_three_times_as_often(
    defective: float, seed: int, epochs: int
) -> None:
    hard = [i in (0, 7, 31, 34) for i in range(len(LABELS))]  # two of them are good images
    sampler = BalancedSampler(LABELS, defective, seed, hard)
    labels, counts = np.array(LABELS), np.zeros(len(LABELS), int)
    for _ in range(epochs):
        drawn = list(sampler)
        assert sum(LABELS[i] >= 0 for i in drawn) == round(defective * len(LABELS))
        np.add.at(counts, drawn, 1)
    good = np.flatnonzero(labels < 0)
    turns = np.where(np.isin(good, (0, 7)), 3, 1)  # in a round of 45 turns: 41 images and 2 x 2
    rounds, rest = divmod(int(counts[good].sum()), 45)
    assert (counts[good] >= rounds * turns).all() and (counts[good] <= (rounds + 1) * turns).all()
    if rest == 0:
        assert (counts[good] == rounds * turns).all()
    for label in (0, 1, 2):  # of defective images nothing changes
        assert np.ptp(counts[labels == label]) <= 1


def test_without_hard_negatives_epochs_are_as_they_were() -> None:
    with_none = BalancedSampler(LABELS, 0.5, 3, [False] * len(LABELS))
    assert list(with_none) == list(BalancedSampler(LABELS, 0.5, 3))


def test_epochs_differ_and_can_be_repeated() -> None:
    sampler, other = (BalancedSampler(LABELS, 0.5, seed) for seed in (0, 1))
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    sampler.epoch = 1  # as when a training goes on
    assert [list(sampler), list(sampler)] == epochs[1:]
    assert list(other) != epochs[0]


def test_processes_share_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(BalancedSampler(LABELS, 0.5, 0))
    parts = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = BalancedSampler(LABELS, 0.5, 0)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == 17
    together = [i for images in zip(*parts, strict=True) for i in images]
    assert together[:50] == whole and together[50:] == whole[:1]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_shows_balanced_epochs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    given = begin(monkeypatch, config(dataset, tmp_path, defective=0.75, paste=0.0))
    trainer = PromptTrainer(overrides=given | {"workers": workers, "mosaic": 0.0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    labels = {str(s.path): s.label for s in Dataset(dataset).split("train")}
    good: set[str] = set()
    for _ in range(4):
        files = [file for batch in loader for file in batch["im_file"]]
        assert (
            sorted(labels[file] for file in files) == [-1] * 3 + [0] * 4 + [1] * 5
            or sorted(labels[file] for file in files) == [-1] * 3 + [0] * 5 + [1] * 4
        )
        good |= {file for file in files if labels[file] < 0}
    assert len(good) == 4
    loader.close()
    assert trainer.balance is not None
    trainer.train_loader, trainer.epoch = loader, 2
    trainer._close_dataloader_mosaic()  # workers may have begun epoch 4
    assert trainer.balance.epoch == 2


def test_fewer_shots_are_a_part_of_more_and_good_images_stay() -> None:
    samples = [
        Sample(i, Path(f"{i}.png"), 64, 48, ({"category_id": label + 1, "area": 1},) * (label >= 0))
        for i, label in enumerate(LABELS)
    ]
    first: set[int] = set()
    for seed in range(9):
        fewer: set[int] = set()
        for shots in (1, 2, 4, 9):
            chosen = [sample.image_id for sample in few_shot(samples, shots, seed)]
            assert chosen == sorted(chosen)
            for label, images in ((-1, 41), (0, 3), (1, 5), (2, 1)):
                found = sum(LABELS[i] == label for i in chosen)
                assert found == (images if label < 0 else min(shots, images))
            assert fewer < set(chosen)
            fewer = set(chosen)
        assert chosen == list(range(50))
        first |= {s.image_id for s in few_shot(samples, 1, seed) if s.label == 1}
    assert len(first) > 1, "another seed chooses others"


def test_training_sees_so_many_shots(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(dataset, tmp_path, shots=1, defective=0.0)
    trainer = PromptTrainer(overrides=begin(monkeypatch, given) | {"workers": 0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    labels = {str(s.path): s.label for s in Dataset(dataset).split("train")}
    files = [file for batch in loader for file in batch["im_file"]]
    assert sorted(labels[file] for file in files) == [-1] * 4 + [0, 1]
    assert len(trainer.build_dataset("", "val")) == len(Dataset(dataset).split("val"))


@pytest.mark.parametrize(("mode", "changes"), [("train", {"defective": 0.0}), ("val", {})])
def test_each_image_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, changes: Any
) -> None:
    trainer = PromptTrainer(
        overrides=begin(monkeypatch, config(dataset, tmp_path, **changes)) | {"workers": 0}
    )
    loader = trainer.get_dataloader("", batch_size=4, rank=-1, mode=mode)
    files = sorted(Path(file).name for batch in loader for file in batch["im_file"])
    assert files == sorted(sample.path.name for sample in Dataset(dataset).split(mode))


# ---------------------------------------------------------------- several GPUs


@pytest.mark.usefixtures("no_plots")
def test_several_gpus_through_the_script_of_ultralytics(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher finds the run folder whole, and its script trains, here on one CPU."""
    ran: list[str] = []

    def launch(command: list[str], check: bool) -> None:
        assert command[command.index("--nproc_per_node") + 1] == "2"
        script = Path(command[-1])
        assert (tmp_path / "out" / "weights" / "start.pt").is_file()
        on_cpu = script.read_text().replace(
            "    cfg = DEFAULT", '    state["args"]["device"] = "cpu"\n    cfg = DEFAULT'
        )
        assert on_cpu != script.read_text()
        script.write_text(on_cpu)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess_run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ran.append(done.stdout)

    subprocess_run = subprocess.run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(
        ultralytics_trainer, "select_device", lambda *_, **__: torch.device("cuda", 0)
    )
    monkeypatch.setattr(ultralytics_trainer, "subprocess", types.SimpleNamespace(run=launch))
    out = tmp_path / "out"
    finetune_yolo.run(config(finished.dataset, out, device="0,1"))
    assert len(ran) == 1
    assert epochs_in(out / "results.csv") == [1, 2, 3]
    assert equal(out / "detector.pt", finished.detector)
    model = torch.load(out / "detector.pt", weights_only=False)["model"]
    assert type(model) is yolo_world.WorldModel


def test_loader_shows_what_was_rejected_more_often(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four good training images, one has a hard negative: half of what good ones are shown."""
    reviewed = tmp_path / "reviewed"
    shutil.copytree(dataset, reviewed)
    good = [s for s in Dataset(reviewed).split("train") if s.label < 0]
    defective = next(s for s in Dataset(reviewed).split("train") if s.label >= 0)
    rejected = {"category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    write_json(
        reviewed / "hard_negatives.json",
        [{"image_id": s.image_id, **rejected} for s in (good[1], defective)],
    )
    given = begin(monkeypatch, config(reviewed, tmp_path / "out", paste=0.0))
    trainer = PromptTrainer(overrides=given | {"workers": 0, "mosaic": 0.0})
    loader = trainer.get_dataloader("", batch_size=4, rank=-1)
    files = [file for _ in range(6) for batch in loader for file in batch["im_file"]]
    counts = {s.path.name: files.count(str(s.path.resolve())) for s in good}
    assert len(good) == 4 and sum(counts.values()) == 36  # half of 12 images in 6 epochs
    assert counts == {s.path.name: 18 if s is good[1] else 6 for s in good}
