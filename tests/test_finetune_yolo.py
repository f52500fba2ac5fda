"""`pipeline finetune-yolo`: small real trainings, watched from outside."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from spots import CLASSES, SCRATCH, SIDE, config, options, write_dataset

from pipeline import record
from pipeline.config import FinetuneYoloConfig
from pipeline.data.dataset import Dataset
from pipeline.data.files import read_json, write_json
from pipeline.errors import UserError
from pipeline.models import yolo_world
from pipeline.models.yolo_trainer import PromptTrainer
from pipeline.stages import finetune_yolo

# Ultralytics is imported after our modules, which keep it to themselves.
from ultralytics.engine import trainer as ultralytics_trainer  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


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


# ---------------------------------------------------------------- a class is missing


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
