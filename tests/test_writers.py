"""Pictures written as MP4, WebM, GIF and PNGs, read back with PyAV or OpenCV alone."""

from __future__ import annotations

import os
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from pipeline.data import files, writers
from pipeline.data.writers import Chapter, create

LEVELS = [40, 90, 140, 200]


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("size", [(64, 48), (65, 31)])
def test_webm_has_every_frame_in_time_and_colour(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.webm"
    with create(path, Fraction(10)) as video:
        for level in LEVELS:
            video.write(grey(level, *size), 3)
    with av.open(str(path)) as container:
        assert "webm" in container.format.name
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("vp9", "yuv420p")
        assert context.width - size[0] == size[0] % 2 and context.height - size[1] == size[1] % 2
    decoded = decode(path)
    assert [f.time for f in decoded] == pytest.approx([i / 10 for i in range(12)], abs=1e-3)
    for i, frame in enumerate(decoded):
        assert np.abs(frame.to_ndarray(format="bgr24").astype(int) - LEVELS[i // 3]).max() <= 6


def test_gif_keeps_colours_and_times_and_loops(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    with create(path, Fraction(10)) as gif:
        for colour, repeat in zip(colours, (10, 1, 5), strict=True):
            gif.write(np.full((33, 65, 3), colour, np.uint8), repeat)
    decoded = decode(path)
    assert [frame.time for frame in decoded] == pytest.approx([0, 1.0, 1.1, 1.5])
    for frame, colour in zip(decoded, [*colours, colours[-1]], strict=True):
        assert np.abs(frame.to_ndarray(format="bgr24").astype(int) - colour).max() <= 2
    data = path.read_bytes()
    assert data[:6] == b"GIF89a"
    loop = data.index(b"NETSCAPE2.0") + 11
    assert data[loop : loop + 4] == b"\x03\x01\x00\x00"  # without an end


def test_pngs_are_numbered_and_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (31, 65, 3), np.uint8) for _ in range(3)]
    with create(tmp_path / "frames", Fraction(10)) as pictures:
        for image in images:
            pictures.write(image, 7)
    names = sorted(p.name for p in (tmp_path / "frames").iterdir())
    assert names == ["000001.png", "000002.png", "000003.png"]
    for name, image in zip(names, images, strict=True):
        assert (cv2.imread(str(tmp_path / "frames" / name)) == image).all()


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chapters_are_listed_with_their_times(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    chapters = [Chapter("title", 5), Chapter("bent lead", 10), Chapter("gut – good", 15)]
    with create(path, Fraction(10), chapters) as video:
        video.write(grey(90), 30)
    with av.open(str(path)) as container:
        found = container.chapters()
    assert [float(c["start"] * c["time_base"]) for c in found] == pytest.approx([0, 0.5, 1.5])
    assert [float(c["end"] * c["time_base"]) for c in found] == pytest.approx([0.5, 1.5, 3.0])
    assert [c["metadata"]["title"] for c in found] == ["title", "bent lead", "gut – good"]
    assert len(decode(path)) == 30


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with create(path, Fraction(10)) as video:
        video.write(grey(50))
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), create(path, Fraction(10)) as video:
        video.write(grey(50))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="at least one frame"), create(path, Fraction(10)):
        pass
    with pytest.raises(ValueError, match="an image of"), create(path, Fraction(10)) as video:
        video.write(grey(50))
        video.write(grey(50, 10, 10))
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_what_was_written_is_counted(tmp_path: Path) -> None:
    """A frame that the encoder swallowed is noticed, and no file appears."""
    path = tmp_path / "a.mp4"
    with pytest.raises(RuntimeError, match="expected"), create(path, Fraction(10)) as video:
        video.write(grey(50), 3)
        assert isinstance(video, writers.VideoWriter)
        video.frames += 1
    assert not list(tmp_path.iterdir())


def test_without_unnamed_files_a_hidden_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    seen = []
    with files.unnamed_path(tmp_path / "a.txt") as path:
        path.write_text("new")
        seen = [p.name for p in tmp_path.iterdir()]
    assert len(seen) == 1 and seen[0].startswith(".a-")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_an_unnamed_file_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with files.unnamed_path(tmp_path / "a.txt") as path:
        path.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a"])
def test_memory_does_not_grow_with_the_frames(tmp_path: Path, name: str) -> None:
    """A frame is 37 kB here: 150 more, kept, would be 5 MB."""

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            with create(tmp_path / name, Fraction(10)) as video:
                for i in range(count):
                    video.write(grey(i % 200, 128, 96))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)
    assert peak(160) - peak(10) < 500_000
