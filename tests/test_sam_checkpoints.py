"""Checkpoints of SAMs: published ones, our own, and other files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sam_cases import random_lite
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from pipeline.data.quality import Calibration
from pipeline.errors import UserError
from pipeline.models import imagenet, weights
from pipeline.models import sam as sams
from pipeline.models.sam import LoadedSam, load_sam, save_sam

PUBLISHED_BYTES = {
    "sam-vit-b": 375_042_383,
    "sam-vit-l": 1_249_524_607,
    "sam-vit-h": 2_564_550_879,
    "mobile-sam": 40_728_226,
}


@pytest.fixture(scope="module")
def lite() -> Sam:
    return random_lite()


def published(architecture: str) -> dict[str, torch.Tensor]:
    """A state dict of the published names and shapes; the i-th tensor is i everywhere.

    The names of MobileSAM are those that Ultralytics reads the published file with.
    """
    if architecture == "mobile-sam":
        from ultralytics.models.sam.build import build_mobile_sam

        model: nn.Module = build_mobile_sam()
    else:
        with torch.device("meta"):
            model = sam_model_registry[architecture.removeprefix("sam-").replace("-", "_")]()
    return {
        key: torch.tensor(i, dtype=tensor.dtype).expand(tensor.shape)  # one number on disk
        for i, (key, tensor) in enumerate(model.state_dict().items())
    }


@pytest.mark.parametrize("architecture", PUBLISHED_BYTES)
def test_published_checkpoints_are_told_apart(architecture: str) -> None:
    state = published(architecture)
    size = 4 * sum(tensor.numel() for tensor in state.values())
    assert 0.99 < size / PUBLISHED_BYTES[architecture] < 1  # the rest is the names
    assert sams._architecture_of(state) == architecture


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("sam-vit-b", "sam_vit_b_01ec64.pth"), ("mobile-sam", "mobile_sam.pt")],
)
def test_loads_a_published_checkpoint(tmp_path: Path, architecture: str, name: str) -> None:
    state = published(architecture)
    torch.save(state, tmp_path / name)
    loaded = load_sam(str(tmp_path / name))
    assert (loaded.architecture, loaded.zoom) == (architecture, sams.WHOLE_IMAGE)
    assert loaded.calibration == Calibration(1, 0)
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for i, tensor in enumerate(found[key] for key in state):
        assert (tensor == i).all()
    assert loaded.model.image_encoder.img_size == 1024


def test_sam_lite_starts_from_imagenet() -> None:
    loaded = load_sam(sams.IMAGENET_START)
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", sams.LITE_ZOOM)
    assert loaded.calibration == Calibration(1, 0)
    whole: Any = imagenet.efficientnet_lite0(pretrained=True).eval()
    encoder = loaded.model.image_encoder.eval()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        coarsest = encoder.backbone(image)[-1]
        expected = whole.blocks(whole.bn1(whole.conv_stem(image)))  # without the head
    torch.testing.assert_close(coarsest, expected, atol=1e-4, rtol=1e-4)
    assert coarsest.std() > 0.1


def test_save_and_load(lite: Sam, tmp_path: Path) -> None:
    path = tmp_path / "sam.safetensors"
    calibration = Calibration(0.1 + 0.2, -1.0 / 3)
    save_sam(path, LoadedSam(lite, "sam-lite", 1.75, calibration))
    loaded = load_sam(str(path))
    assert (loaded.architecture, loaded.zoom) == ("sam-lite", 1.75)
    assert loaded.calibration == calibration
    expected = lite.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for key, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == expected[key].dtype, key
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-6)
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in lite.parameters())  # half precision
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_comes_from_the_registry(
    lite: Sam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_sam(tmp_path / "a.safetensors", LoadedSam(lite, "sam-lite", 2))
    asked = []

    def resolve(name: str, *, offline: bool) -> Path:
        asked.append((name, offline))
        return tmp_path / "a.safetensors"

    monkeypatch.setattr(weights, "resolve", resolve)
    assert load_sam("sam-lite", offline=True).zoom == 2
    assert asked == [("sam-lite", True)]


@pytest.mark.parametrize("architecture", PUBLISHED_BYTES)
def test_a_registry_name_that_cannot_be_had(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=f"^{architecture}: .*not on this machine"):
        load_sam(architecture, offline=True)


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean sam-vit-b"):
        load_sam("sam-vit-bb", offline=True)


class Malicious:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, path)
    path.write_bytes(path.read_bytes()[:-5000])


def _other_network(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"fc.weight": torch.zeros(3, 3)}, path)


def _missing_tensors(path: Path) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(3, 3)}, path)


def _nested(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "signature": "of a training"}, path)


def _a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def _whole_module(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


def _code(path: Path) -> None:
    torch.save({"image_encoder.pos_embed": Malicious(path.with_name("touched"))}, path)


def _old_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(path.with_name("touched")), protocol=2))


def _half_code_half_weights(path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Malicious(path.with_name("touched"))}, path)


@pytest.mark.parametrize("write", [_garbage, _empty, _truncated, _other_network, _missing_tensors])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_named(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    _check_refused(tmp_path / name, write)


@pytest.mark.parametrize(
    "write",
    [_nested, _a_tensor, _whole_module, _code, _old_pickle_with_code, _half_code_half_weights],
)
def test_pickles_of_other_things_are_named_and_not_run(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    _check_refused(tmp_path / "x.pt", write)
    assert not (tmp_path / "touched").exists()


def _check_refused(path: Path, write: Callable[[Path], None]) -> None:
    write(path)
    with pytest.raises(UserError) as caught:
        load_sam(str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: expected")
    assert "\n" not in problem and len(problem) < 600


def test_safetensors_of_another_architecture(tmp_path: Path) -> None:
    """Such as a detector's of ours, whose metadata names its own architecture."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"architecture": "yolov8n-worldv2.yaml"})
    with pytest.raises(UserError, match=r"expected a SAM checkpoint .*found other weights"):
        load_sam(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("calibration", "x"),
        ("calibration", ""),
        ("calibration", "1"),
        ("calibration", "1 0 0"),
        ("calibration", "-1 0"),
        ("calibration", "nan 0"),
        ("calibration", "1 inf"),
        ("zoom", "x"),
        ("zoom", "0.5"),
        ("zoom", "-1"),
        ("zoom", "nan"),
        ("zoom", "inf"),
    ],
)
def test_metadata_that_inference_cannot_use(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "x.safetensors"
    metadata = {"architecture": "tiny", "zoom": "1.5", "calibration": "1 0"}
    save_file({"a": torch.zeros(1)}, path, metadata | {key: value})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setitem(sams.ARCHITECTURES, "tiny", lambda: nn.ParameterDict({"a": torch.ones(1)}))
        load_sam(str(path))
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: expected metadata with a zoom")
    assert repr(value) in problem.split("found")[1]


def test_a_checkpoint_from_before_calibration(lite: Sam, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {key: tensor.contiguous() for key, tensor in lite.state_dict().items()}
    save_file(state, path, {"architecture": "sam-lite", "zoom": "1.5"})
    assert load_sam(str(path)).calibration == Calibration(1, 0)
