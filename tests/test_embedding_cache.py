"""The embedding cache: exact, bounded, shared by processes; tensors on disk; the commands' use."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rectangles import Defects, write_dataset
from torch import nn

from pipeline import cli
from pipeline.config import FinetuneSamConfig, SegmentConfig, build
from pipeline.data import tensors
from pipeline.errors import UserError
from pipeline.models import sam_lite
from pipeline.models.embedding_cache import SUFFIX, CachedEncoder
from pipeline.stages import finetune_sam, segment

SIDE = 16
ENTRY = 950  # bytes: a little more than a file here has
fork = multiprocessing.get_context("fork")  # another process at once, without importing torch


class Encoder(nn.Module):
    """A small encoder with a parameter and a buffer, which counts how often it computes."""

    img_size = SIDE

    def __init__(self, weight: float = 1.5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("mean", torch.zeros(3))
        self.dtype, self.calls = dtype, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        mean: Any = self.mean
        return ((images[:, :, ::2, ::2] - mean[:, None, None]) * self.weight).to(self.dtype)


def picture(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def entries(folder: Path) -> list[Path]:
    """The files in the cache, those that are being written too."""
    return sorted(folder.iterdir())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


# ---- One process -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_equals_what_the_encoder_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = Encoder(dtype=dtype)
    for _ in range(2):  # the second one as if in a later run
        cached = CachedEncoder(encoder, tmp_path / "new" / "cache", 1)
        for seed in (0, 1, 0):
            found = cached(picture(seed))
            assert found.dtype == dtype
            assert torch.equal(found, Encoder(dtype=dtype)(picture(seed)))
    assert encoder.calls == 2
    assert len(entries(tmp_path / "new" / "cache")) == 2
    assert cached.img_size == SIDE


def other_parameter(encoder: Encoder) -> None:
    encoder.weight.data += 1e-6


def other_buffer(encoder: Encoder) -> None:
    encoder.mean[1] = 1e-6  # type: ignore[operator]


def other_precision(encoder: Encoder) -> None:
    encoder.half()


@pytest.mark.parametrize("change", [other_parameter, other_buffer, other_precision])
def test_other_weights_are_another_entry(tmp_path: Path, change: Callable[[Encoder], None]) -> None:
    CachedEncoder(Encoder(), tmp_path, 1)(picture(0))
    encoder = Encoder()
    change(encoder)
    found = CachedEncoder(encoder, tmp_path, 1)(picture(0))
    assert encoder.calls == 1
    assert torch.equal(found, encoder(picture(0)))


def test_another_input_is_another_entry(tmp_path: Path) -> None:
    """One value in the last place, the same values in another shape, another precision."""
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path, 1)
    image = picture(0)
    nudged = image.clone()
    nudged[0, 2, -1, -1] = torch.nextafter(nudged[0, 2, -1, -1], torch.tensor(9.0))
    inputs = [image, nudged, image.reshape(1, 3, SIDE // 2, 2 * SIDE), image.double()]
    for given in inputs:
        assert torch.equal(cached(given), Encoder()(given))
    with torch.autocast("cpu", torch.bfloat16):
        cached(image)
    assert encoder.calls == len(inputs) + 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path, 3 * ENTRY / 1e9)
    (tmp_path / "sam.safetensors").write_bytes(
        bytes(9 * ENTRY)
    )  # not ours: neither counts nor goes
    for seed in (0, 1, 2):
        cached(picture(seed))
        for age, path in enumerate(sorted(tmp_path.glob(f"*{SUFFIX}"), key=_time)):
            os.utime(path, (1000 + age, 1000 + age))
    cached(picture(0))  # used again, so 1 is the oldest
    cached(picture(3))
    assert encoder.calls == 4
    for seed in (0, 2, 3):
        cached(picture(seed))
    assert encoder.calls == 4
    cached(picture(1))
    assert encoder.calls == 5
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 3
    assert (tmp_path / "sam.safetensors").stat().st_size == 9 * ENTRY


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.parametrize("room", [0.5, 1, 2.5])
def test_the_folder_never_holds_more_than_the_limit(tmp_path: Path, room: float) -> None:
    cached = CachedEncoder(Encoder(), tmp_path, room * ENTRY / 1e9)
    for seed in range(6):
        assert torch.equal(cached(picture(seed)), Encoder()(picture(seed)))
        assert size(tmp_path) <= room * ENTRY
    assert len(entries(tmp_path)) == int(room)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def other_tensors(path: Path) -> None:
    tensors.write(path, {"x": torch.zeros(3)}, {})


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, other_tensors])
def test_a_damaged_entry_is_computed_again_and_replaced(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path, 1)
    expected = cached(picture(0))
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(cached(picture(0)), expected)
    assert encoder.calls == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path / "file" / "cache", 1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="embedding not kept"):
            assert torch.equal(cached(picture(0)), Encoder()(picture(0)))
    assert encoder.calls == 2


# ---- Several processes -----------------------------------------------------------------------


def hammer(folder: Path, seed: int) -> None:
    """Ask for seven pictures in random order, where there is room for three."""
    cached = CachedEncoder(Encoder(), folder, 3 * ENTRY / 1e9)
    expected = [Encoder()(picture(i)) for i in range(7)]
    for i in np.random.default_rng(seed).integers(0, 7, 400):
        assert torch.equal(cached(picture(int(i))), expected[i])


def test_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    workers = [fork.Process(target=hammer, args=(tmp_path, seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert 0 < size(tmp_path) <= 3 * ENTRY
    assert all(path.suffix == SUFFIX and path.name[0] != "." for path in entries(tmp_path))


def die_while_writing(folder: Path) -> None:
    def die(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        return target

    Path.replace = die  # type: ignore[method-assign, assignment]
    CachedEncoder(Encoder(), folder, 1)(picture(0))


def test_a_killed_writer_leaves_nothing_that_is_read_and_nothing_that_stays(tmp_path: Path) -> None:
    worker = fork.Process(target=die_while_writing, args=(tmp_path,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    (left,) = entries(tmp_path)
    assert left.stat().st_size > 0  # written, but not in its place
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path, 2 * ENTRY / 1e9)
    assert torch.equal(cached(picture(0)), Encoder()(picture(0)))
    assert encoder.calls == 1
    cached(picture(1))
    assert not left.exists() and len(entries(tmp_path)) == 2


# ---- The commands ----------------------------------------------------------------------------

IMAGES: tuple[Defects, ...] = (
    [("scratch", (10, 12, 40, 30))],
    [("stain", (50, 40, 90, 64)), ("scratch", (2, 2, 30, 20))],
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "d"
    return write_dataset(root, {"train": IMAGES[1:], "test": IMAGES})


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for every time that sam-lite's encoder computes."""
    calls: list[int] = []
    forward = sam_lite.LiteEncoder.forward

    def counted(self: sam_lite.LiteEncoder, image: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return forward(self, image)

    monkeypatch.setattr(sam_lite.LiteEncoder, "forward", counted)
    return calls


def test_segment_gives_the_same_predictions_from_its_cache(
    dataset: Path, sam: str, encoded: list[int], tmp_path: Path
) -> None:
    options = {"source": dataset, "sam": sam, "boxes": "truth", "splits": ("test",)}
    written, calls = [], []
    for name, cache in [("plain", None), ("first", tmp_path / "c"), ("later", tmp_path / "c")]:
        values = options | {"out": tmp_path / name, "cache": cache, "device": "cpu"}
        segment.run(build(SegmentConfig, values))
        written.append((tmp_path / name / "predictions.json").read_bytes())
        calls.append(len(encoded))
    assert written[0] == written[1] == written[2]
    assert calls == [6, 12, 12]  # for each of three defects a window and its mirror image


def test_a_decoder_is_trained_the_same_from_the_cache(
    dataset: Path, sam: str, encoded: list[int], tmp_path: Path
) -> None:
    options = {"data": dataset, "model": sam, "epochs": 1, "repeats": 2, "device": "cpu"}
    written, calls = [], []
    for name, cache in [("plain", None), ("first", tmp_path / "c"), ("later", tmp_path / "c")]:
        values = options | {"out": tmp_path / name, "cache": cache}
        finetune_sam.run(build(FinetuneSamConfig, values))
        written.append((tmp_path / name / finetune_sam.BEST).read_bytes())
        calls.append(len(encoded))
    assert written[0] == written[1] == written[2]
    assert calls == [4, 8, 8]  # two copies of each defect


def test_a_file_in_place_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c").touch()
    arguments = ["segment", "--source", "x", "--boxes", "truth", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--cache", str(tmp_path / "c")])
    assert stopped.value.code == 2
    assert f"--cache: expected a folder, found the file {tmp_path / 'c'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- Tensors on disk -------------------------------------------------------------------------


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.tensor([1.5, -2]).half(),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3, dtype=torch.bfloat16),
    }
    metadata = {"b": 'a "quote"\n', "a": "größer", "c": ""}
    tensors.write(tmp_path / "x.safetensors", state, metadata)
    found, about = tensors.read(tmp_path / "x.safetensors", "tensors")
    assert about == metadata
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    """Also in another order; safetensors itself writes the metadata in random order."""
    state = {key: torch.full((2,), float(i)) for i, key in enumerate("abcd")}
    metadata = {key: key for key in "klmnopq"}
    written = set()
    for i in range(4):
        turned = dict(reversed(metadata.items())) if i % 2 else metadata
        tensors.write(tmp_path / "x", dict(reversed(state.items())) if i > 1 else state, turned)
        written.add((tmp_path / "x").read_bytes())
    assert len(written) == 1


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x")
    state, metadata = tensors.read(tmp_path / "x", "tensors")
    assert metadata == {} and torch.equal(state["a"], torch.ones(2))


@pytest.mark.parametrize("content", [None, b"", b"no tensors", bytes(100)])
def test_another_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'x'}: expected a lamp, found [^\n]+$"):
        tensors.read(tmp_path / "x", "a lamp")
