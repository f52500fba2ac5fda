"""YOLO-World networks: starting points, prompts, saving, detecting; devices; text prompts."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.models import device, text, weights, yolo_world
from pipeline.models.ultralytics_settings import quiet
from pipeline.models.yolo_world import Detector, PromptedWorldModel, load_model, set_prompts

# Ultralytics is imported after `yolo_world`, which keeps it to itself.
from ultralytics import settings  # isort: skip
from ultralytics.cfg import get_cfg  # isort: skip
from ultralytics.nn.tasks import (  # isort: skip
    DetectionModel,
    PoseModel,
    SegmentationModel,
    WorldModel,
)
from ultralytics.utils.torch_utils import ModelEMA  # isort: skip

CLASSES = ("cut", "bent")
SCRATCH = "yolov8n-worldv2.yaml"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def with_random_statistics(model: nn.Module) -> Any:
    """As after a training: no BatchNorm is the identity."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
            statistics = dict(layer.named_buffers())
            statistics["running_mean"].normal_(0, 0.2)
            statistics["running_var"].uniform_(0.5, 1.5)
    return model.eval()


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


# ---------------------------------------------------------------- starting points


@torch.inference_mode()
def neck_and_boxes(model: DetectionModel) -> list[torch.Tensor]:
    """What goes into the head at three strides, raw box distributions, and decoded boxes."""
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    decoded, raw = model.eval()(images)
    return [*raw["feats"], raw["boxes"], decoded[:, :4]]


def as_it_is(model: DetectionModel, folder: Path) -> WorldModel:
    return yolo_world.from_yolov8(deepcopy(model))


def through_a_checkpoint(model: DetectionModel, folder: Path) -> WorldModel:
    torch.save({"model": model, "train_args": {"imgsz": 96}}, folder / "mine.pt")
    return load_model(str(folder / "mine.pt"))


def through_an_old_checkpoint(model: DetectionModel, folder: Path) -> WorldModel:
    """Early Ultralytics did not save which network it was."""
    old = deepcopy(model)
    del old.yaml["scale"], old.yaml["scales"], old.yaml["yaml_file"]
    return through_a_checkpoint(old, folder)


@pytest.mark.parametrize("convert", [as_it_is, through_a_checkpoint, through_an_old_checkpoint])
@pytest.mark.parametrize(("scale", "classes"), [("n", 80), ("n", 3), ("s", 80)])
def test_conversion_keeps_neck_and_boxes_of_yolov8(
    tmp_path: Path,
    convert: Callable[[DetectionModel, Path], WorldModel],
    scale: str,
    classes: int,
) -> None:
    given = with_random_statistics(DetectionModel(f"yolov8{scale}.yaml", nc=classes, verbose=False))
    expected = neck_and_boxes(given)
    world = convert(given, tmp_path)
    assert type(world) is WorldModel
    for actual, wanted in zip(neck_and_boxes(world), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_conversion_is_the_same_for_any_prompts() -> None:
    given = with_random_statistics(DetectionModel("yolov8n.yaml", verbose=False))
    world = set_prompts(yolo_world.from_yolov8(given), [f"class {i}" for i in range(90)], None)
    for actual, wanted in zip(neck_and_boxes(world), neck_and_boxes(given), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_attention_of_a_converted_model_can_be_trained() -> None:
    """The new input starts at zero, but not its gradient."""
    world = yolo_world.from_yolov8(DetectionModel("yolov8n.yaml", verbose=False))
    model = set_prompts(world, CLASSES, None)
    before, after = train(model, steps=2)
    attention = [key for key in after if key.endswith("attn.gl.weight")]
    assert len(attention) == 4
    for key in attention:
        assert (after[key] != before[key]).any(), key


@pytest.mark.parametrize("scale", ["n", "s"])
def test_official_checkpoint_is_taken_as_it_is(tmp_path: Path, scale: str) -> None:
    official = with_random_statistics(
        WorldModel(f"yolov8{scale}-worldv2.yaml", nc=80, verbose=False)
    )
    official.names = {i: f"thing {i}" for i in range(80)}
    path = tmp_path / f"yolov8{scale}-worldv2.pt"
    saved = deepcopy(official).half()
    torch.save({"epoch": -1, "model": saved, "ema": None, "train_args": {"imgsz": 640}}, path)
    loaded = load_model(str(path))
    assert type(loaded) is WorldModel
    assert loaded.names == official.names
    rounded = {k: v.half().float() for k, v in official.state_dict().items()}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.float(), rounded[key]), key
    found = Detector(set_prompts(loaded, CLASSES, None), 64, torch.device("cpu"))
    assert found.classes == CLASSES
    found.detect(image(64, 64), 0.0, 5)


def test_random_weights_expect_few_objects() -> None:
    """Without that prior every anchor would start at a score of a half."""
    model = set_prompts(load_model(SCRATCH), CLASSES, None).eval()
    with torch.inference_mode():
        scores = model(torch.rand(1, 3, 64, 64))[0][:, 4:]
    assert 0 < scores.max() < 0.01


def checkpoint_of(model: nn.Module) -> Callable[[Path], object]:
    return lambda path: torch.save({"model": model, "train_args": {}}, path)


def write_truncated(path: Path) -> None:
    torch.save({"model": nn.Linear(9, 9)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def write_other_safetensors(path: Path) -> None:
    save_file({"w": torch.zeros(1)}, path, {"architecture": "sam-lite"})


BAD_CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "segmentation": (
        "a.pt",
        checkpoint_of(SegmentationModel("yolov8n-seg.yaml", verbose=False)),
        "expected a YOLO-World or YOLOv8 detector, found SegmentationModel of yolov8n-seg.yaml",
    ),
    "pose": (
        "a.pt",
        checkpoint_of(PoseModel("yolov8n-pose.yaml", verbose=False)),
        "expected a YOLO-World or YOLOv8 detector, found PoseModel of yolov8n-pose.yaml",
    ),
    "another detector": (
        "a.pt",
        checkpoint_of(DetectionModel("yolo11n.yaml", verbose=False)),
        "expected a YOLO-World or YOLOv8 detector, found DetectionModel of yolo11n.yaml",
    ),
    "another network": (
        "a.pt",
        checkpoint_of(nn.Linear(2, 2)),
        "expected a YOLO-World or YOLOv8 detector, found Linear of unknown",
    ),
    "weights alone": (
        "a.pt",
        lambda path: torch.save({"conv.weight": torch.zeros(2)}, path),
        "expected an Ultralytics checkpoint, found",
    ),
    "text": (
        "a.pt",
        lambda path: path.write_text("not a network"),
        "expected an Ultralytics checkpoint, found",
    ),
    "empty": ("a.pt", Path.touch, "expected an Ultralytics checkpoint, found"),
    "truncated": ("a.pt", write_truncated, "expected an Ultralytics checkpoint, found"),
    "an image": (
        "a.png",
        lambda path: cv2.imwrite(str(path), image(4, 4)),
        "expected an Ultralytics checkpoint, found",
    ),
    "folder": ("a", Path.mkdir, "expected an Ultralytics checkpoint, found"),
    "bad safetensors": (
        "a.safetensors",
        lambda path: path.write_text("not a network"),
        "expected safetensors, found",
    ),
    "other safetensors": (
        "a.safetensors",
        write_other_safetensors,
        "expected YOLO-World weights, found those of sam-lite",
    ),
}


@pytest.mark.parametrize(
    ("name", "write", "problem"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS
)
def test_bad_checkpoint(
    tmp_path: Path, name: str, write: Callable[[Path], object], problem: str
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError) as raised:
        load_model(str(path))
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(f"{path}: {problem}")
    assert "\n" not in raised.value.problems[0]


def test_unknown_name() -> None:
    with pytest.raises(UserError, match=r"did you mean .*yolov8s-worldv2"):
        load_model("yolov8s-worldv3", offline=True)


# ---------------------------------------------------------------- prompts


def train(
    model: PromptedWorldModel, steps: int = 1, cls: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after a few steps on one image with one object."""
    model.args = get_cfg()
    model.requires_grad_(True).train()
    batch = {
        "img": torch.rand(1, 3, 64, 64),
        "batch_idx": torch.zeros(1),
        "cls": torch.tensor([[float(cls)]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]),
    }
    before = deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _items = model(batch)
        assert loss.sum().isfinite()
        loss.sum().backward()
        optimizer.step()
    return before, model.state_dict()


def test_learned_prompts_are_trained_and_averaged() -> None:
    model = set_prompts(load_model(SCRATCH), CLASSES, None)
    ema = ModelEMA(model)
    before, after = train(model)
    assert before["txt_feats"].shape == (1, 2, 512)
    assert (before["txt_feats"] != after["txt_feats"]).any()
    ema.update(model)
    assert (ema.ema.state_dict()["txt_feats"] != before["txt_feats"]).any()


def test_fixed_prompts_stay() -> None:
    embeddings = torch.randn(2, 512)
    model = set_prompts(load_model(SCRATCH), CLASSES, embeddings)
    before, after = train(model)
    assert "txt_feats" not in before
    assert any((before[k] != after[k]).any() for k in before)
    assert torch.equal(model.txt_feats[0], embeddings)


@pytest.mark.parametrize("classes", [1, 2, 90])  # 80 is what the network is built for
def test_every_class_has_a_score_and_learns(classes: int) -> None:
    model = set_prompts(load_model(SCRATCH), [f"class {i}" for i in range(classes)], None)
    before, after = train(model, cls=classes - 1)
    changed = (before["txt_feats"] != after["txt_feats"])[0].any(1)
    assert changed.all()
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 64, 64))[0].shape[1] == 4 + classes
    assert model.nc == len(model.names) == classes


def test_the_number_of_classes_may_change_between_trainings() -> None:
    model = set_prompts(load_model(SCRATCH), CLASSES, None)
    train(model)
    train(set_prompts(model, [f"class {i}" for i in range(5)], None), cls=4)


def test_new_prompts_are_orthonormal_and_seeded() -> None:
    prompts = [
        set_prompts(load_model(SCRATCH), CLASSES, None, seed).txt_feats[0].detach()
        for seed in (0, 0, 1)
    ]
    torch.testing.assert_close(prompts[0] @ prompts[0].T, torch.eye(2), rtol=0, atol=1e-6)
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


@pytest.mark.parametrize(
    ("classes", "rows"),
    [
        (("cut", "bent"), [0, 1]),
        (("bent", "cut"), [1, 0]),
        (("bent",), [1]),
        (("bent", "new"), None),
    ],
)
def test_prompts_of_known_classes_are_kept(
    classes: tuple[str, ...], rows: list[int] | None
) -> None:
    trained = set_prompts(load_model(SCRATCH), CLASSES, None)
    trained.txt_feats.data.normal_()
    learned = trained.txt_feats[0].detach().clone()
    again = set_prompts(yolo_world.plain(trained), classes, None, seed=5)
    assert isinstance(again.txt_feats, nn.Parameter)
    assert again.names == dict(enumerate(classes))
    if rows is not None:
        assert torch.equal(again.txt_feats[0], learned[rows])
    else:
        norms = again.txt_feats[0].norm(dim=1)  # what was learned here has norms around 22
        torch.testing.assert_close(norms, torch.ones(2), rtol=0, atol=1e-5)


def test_a_plain_model_is_ultralytics_own() -> None:
    model = yolo_world.plain(set_prompts(load_model(SCRATCH), CLASSES, None))
    assert type(model) is WorldModel
    assert not isinstance(model.txt_feats, nn.Parameter)
    assert "txt_feats" not in model.state_dict()


# ---------------------------------------------------------------- text


def test_text_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(UserError, match="expected the package clip-anytorch"):
        text.clip_embeddings(["a"], offline=True)


def test_text_needs_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    monkeypatch.setenv("PIPELINE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="clip-vit-b-32"):
        text.clip_embeddings(["a"], offline=True)


def test_text_embeddings_have_length_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Encoder:
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens[:, :1].half() * torch.arange(1, 513)

    def load(name: str, device: str) -> tuple[Encoder, None]:
        assert (name, device) == (str(tmp_path / "clip.pt"), "cpu")
        return Encoder(), None

    clip: Any = types.ModuleType("clip")
    clip.load = load
    clip.tokenize = lambda texts: torch.tensor([[len(t)] for t in texts])
    monkeypatch.setitem(sys.modules, "clip", clip)
    monkeypatch.setattr(weights, "resolve", lambda name, offline: tmp_path / "clip.pt")
    embeddings = text.clip_embeddings(["a", "bc"], offline=True)
    assert embeddings.shape == (2, 512)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


# ---------------------------------------------------------------- saving and detecting


@pytest.fixture(scope="module")
def detectable() -> PromptedWorldModel:
    """A model whose scores differ from anchor to anchor, so that the order of boxes is defined."""
    torch.manual_seed(3)
    model = set_prompts(load_model(SCRATCH), CLASSES, None)
    with_random_statistics(model)
    for contrast in model.model[-1].cv4:
        contrast.bias.data.fill_(-1.0)
    model.args = {"imgsz": 96}
    return model


def detect(model: WorldModel, size: int | None = None, **options: Any) -> Any:
    detector = Detector(deepcopy(model), size, torch.device("cpu"))
    return detector.detect(image(60, 96), **{"min_score": 0.01, "max_boxes": 5, **options})


def test_safetensors_round_trip(detectable: PromptedWorldModel, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    yolo_world.save_safetensors(detectable, path, 96)
    assert path.stat().st_size < 2.1 * sum(v.numel() for v in detectable.state_dict().values())
    loaded = load_model(str(path))
    assert loaded.names == dict(enumerate(CLASSES))
    assert Detector(deepcopy(loaded), None, torch.device("cpu")).image_size == 96
    torch.testing.assert_close(loaded.txt_feats, detectable.txt_feats.data, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(  # half precision changes scores little; NMS may swap near equals
        scores(loaded), scores(detectable), rtol=0.02, atol=0.002
    )
    assert isinstance(set_prompts(loaded, CLASSES, None).txt_feats, nn.Parameter)


@torch.inference_mode()
def scores(model: WorldModel) -> torch.Tensor:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model.eval()(images)[0][:, 4:]


def test_safetensors_of_a_plain_model(detectable: PromptedWorldModel, tmp_path: Path) -> None:
    """Prompts are saved whether they are a parameter or not."""
    plain = yolo_world.plain(deepcopy(detectable))
    yolo_world.save_safetensors(plain, tmp_path / "a.safetensors", 96)
    yolo_world.save_safetensors(detectable, tmp_path / "b.safetensors", 96)
    a, b = (load_model(str(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert torch.equal(a.txt_feats, b.txt_feats)


def test_checkpoint_round_trip(detectable: PromptedWorldModel, tmp_path: Path) -> None:
    yolo_world.save_checkpoint(detectable, tmp_path / "start.pt")
    loaded = load_model(str(tmp_path / "start.pt"))
    assert isinstance(loaded.txt_feats, nn.Parameter)
    assert torch.equal(scores(loaded), scores(detectable))


def test_boxes_are_in_the_image_and_in_order(detectable: PromptedWorldModel) -> None:
    found = detect(detectable)
    assert len(found) == 5
    assert (found.confidence[:-1] >= found.confidence[1:]).all()
    assert (found.xyxy >= 0).all()
    assert (found.xyxy <= [96, 60, 96, 60]).all()
    assert set(found.class_id) <= {0, 1}


def test_limits(detectable: PromptedWorldModel) -> None:
    assert len(detect(detectable, max_boxes=3)) == 3
    third = float(detect(detectable).confidence[2])
    assert len(detect(detectable, min_score=third)) == 2
    nothing = detect(detectable, min_score=1.0)
    assert len(nothing) == 0
    assert nothing.xyxy.shape == (0, 4)


def test_image_size_is_that_of_the_training_by_default(detectable: PromptedWorldModel) -> None:
    default, same, other = detect(detectable), detect(detectable, 96), detect(detectable, 64)
    assert np.array_equal(default.xyxy, same.xyxy)
    assert not np.array_equal(default.xyxy, other.xyxy)


def test_boxes_follow_the_image(detectable: PromptedWorldModel) -> None:
    """The same picture at twice the size gives the same boxes at twice the size."""
    small = cv2.resize(image(6, 8), (96, 72), interpolation=cv2.INTER_CUBIC)
    large = small.repeat(2, 0).repeat(2, 1)
    detector = Detector(deepcopy(detectable), 96, torch.device("cpu"))
    found, expected = (detector.detect(picture, 0.01, 5) for picture in (large, small))
    np.testing.assert_allclose(found.xyxy, expected.xyxy * 2, atol=0.5)


# ---------------------------------------------------------------- Ultralytics' surroundings


def test_ultralytics_keeps_to_itself() -> None:
    assert settings["sync"] is False
    trackers = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
    assert [name for name in trackers if settings[name]] == []
    assert settings.file.is_relative_to(os.environ["YOLO_CONFIG_DIR"])
    assert settings.file.is_relative_to(tempfile.gettempdir())


def test_quiet_lets_warnings_through_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ultralytics")
    with quiet():
        with quiet():
            log.info("a")
        log.info("b")
        log.warning("c")
    log.info("d")
    assert [message[-1] for message in caplog.messages] == ["c", "d"]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("wanted", "gpus", "mps", "expected"),
    [
        ("auto", 2, False, "0"),
        ("auto", 0, True, "mps"),
        ("auto", 0, False, "cpu"),
        ("cpu", 2, False, "cpu"),
        ("mps", 0, True, "mps"),
        ("1", 2, False, "1"),
        ("0,1", 2, False, "0,1"),
        ("0", 0, False, None),
        ("2", 2, False, None),
        ("0,2", 2, False, None),
        ("0,0", 2, False, None),
        ("0,", 2, False, None),
        ("-1", 2, False, None),
        ("", 2, False, None),
        ("cuda:0", 2, False, None),
        ("mps", 2, False, None),
        ("tpu", 2, False, None),
    ],
)
def test_device_names(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, mps: bool, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if expected is None:
        with pytest.raises(UserError, match=rf"^--device: .* found '{wanted}'$"):
            device.device_name(wanted)
    else:
        assert device.device_name(wanted) == expected


def test_one_torch_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.torch_device("1") == torch.device("cuda", 1)
    assert device.torch_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"^--device: expected one device, found '0,1'$"):
        device.torch_device("0,1")


@pytest.mark.parametrize(
    ("amx", "avx512", "fast"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_where_bfloat16_is_fast(
    amx: bool, avx512: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    found = [device.has_fast_bfloat16(kind) for kind in ("cuda", "cpu", "mps")]
    assert found == [True, fast, False]
