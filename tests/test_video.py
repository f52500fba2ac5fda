"""Frames in and video out. Files are read back with PyAV alone, or byte by byte."""

from __future__ import annotations

import signal
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from pipeline.data.video import count_frames, frames, probe
from pipeline.data.writers import create, top_level_boxes
from pipeline.errors import UserError


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def write(
    path: Path, images: list[np.ndarray], fps: Fraction = Fraction(10), repeat: int = 1
) -> Path:
    with create(path, fps) as video:
        for image in images:
            video.write(image, repeat)
    return path


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(
    ("size", "coded"), [((64, 48), (64, 48)), ((65, 48), (66, 48)), ((33, 31), (34, 32))]
)
@pytest.mark.parametrize("repeat", [1, 4])
def test_a_browser_can_play_it(
    tmp_path: Path, size: tuple[int, int], coded: tuple[int, int], repeat: int
) -> None:
    levels = [40, 90, 140, 200]
    path = write(tmp_path / "a.mp4", [grey(level, *size) for level in levels], repeat=repeat)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == coded
        assert stream.average_rate == 10
        decoded = list(container.decode(stream))
    assert [frame.time for frame in decoded] == pytest.approx([i / 10 for i in range(4 * repeat)])
    if repeat > 1:
        assert [i for i, frame in enumerate(decoded) if frame.key_frame] == [0, 4, 8, 12]
    for i, frame in enumerate(decoded):
        pixels = frame.to_ndarray(format="bgr24").astype(int)
        assert np.abs(pixels - levels[i // repeat]).max() <= 4
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    boxes = top_level_boxes(path)
    assert boxes[0] == "ftyp" and boxes.index("moov") < boxes.index("mdat")
    assert list(tmp_path.iterdir()) == [path]


def test_colours_are_bt709_and_say_so(tmp_path: Path) -> None:
    """Luma of pure red, by hand: 16 + 219 x 0.2126 = 62.6 (BT.601 would give 81.5)."""
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 2] = 255
    path = write(tmp_path / "a.mp4", [red])
    (frame,) = decode(path)
    assert np.asarray(frame.planes[0])[0] == pytest.approx(63, abs=2)
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (
        1,
        1,
        1,
        1,
    )
    assert np.abs(next(frames(path)).image.astype(int) - red).max() <= 6


@pytest.mark.parametrize(
    "fps",
    [Fraction(25, 2), Fraction(30000, 1001), Fraction(31870, 1063), Fraction(1, 2), Fraction(60)],
)
def test_any_frame_rate_is_kept(tmp_path: Path, fps: Fraction) -> None:
    info = probe(write(tmp_path / "a.mp4", [grey(level) for level in range(40, 70)], fps))
    assert float(info.fps) == pytest.approx(float(fps), rel=1e-3)
    assert info.frames == 30


@pytest.mark.parametrize("old", [None, b"an older video"])
def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "a.mp4"
    if old:
        path.write_bytes(old)
    with pytest.raises(ZeroDivisionError), create(path, Fraction(10)) as video:
        video.write(grey(50))
        raise ZeroDivisionError
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_kill_half_way_leaves_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    code = (
        "import sys, numpy as np\nfrom fractions import Fraction\nfrom pathlib import Path\n"
        "from pipeline.data.writers import create\n"
        "with create(Path(sys.argv[1]), Fraction(10)) as video:\n"
        "    for i in range(10**9):\n"
        "        video.write(np.random.randint(0, 255, (64, 64, 3), np.uint8))\n"
        "        if i == 50: print('50 frames', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"50 frames\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not path.exists()
    if sys.platform == "linux":
        assert not list(tmp_path.iterdir())


def test_no_frames_and_mixed_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(ValueError, match="at least one frame"):
        write(path, [])
    with pytest.raises(ValueError, match="expected an image of"):
        write(path, [grey(50), grey(50, 80, 80)])
    assert not list(tmp_path.iterdir())


def test_frames_of_a_folder(tmp_path: Path) -> None:
    for name, level in [("b.png", 20), ("a.jpg", 10), ("c.BMP", 30)]:
        _, buffer = cv2.imencode(Path(name).suffix.lower(), grey(level))
        (tmp_path / name).write_bytes(buffer.tobytes())
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = list(frames(tmp_path))
    assert [(f.image_id, f.name) for f in found] == [(1, "a.jpg"), (2, "b.png"), (3, "c.BMP")]
    assert [int(f.image[5, 5, 0]) for f in found] == pytest.approx([10, 20, 30], abs=1)
    assert count_frames(tmp_path) == 3


def test_frames_of_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "line 3.mp4", [grey(level) for level in (30, 60, 90)])
    found = list(frames(path))
    assert [(f.image_id, f.name) for f in found] == [
        (1, "line 3_000000"), (2, "line 3_000001"), (3, "line 3_000002"),
    ]  # fmt: skip
    assert [int(f.image[5, 5, 0]) for f in found] == pytest.approx([30, 60, 90], abs=3)
    assert count_frames(path) == 3


def test_a_recording_held_upright_is_turned(tmp_path: Path) -> None:
    """The matrix (0 1 0, -1 0 0, 0 0 1) of `tkhd` turns clockwise: left top becomes right top."""
    image = grey(30)
    image[:24, :32] = 220
    path = write(tmp_path / "a.mp4", [image])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # flags, times and ids, reserved, layer ...
    numbers = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    assert data[matrix : matrix + 36] == b"".join(n.to_bytes(4, "big") for n in numbers)
    turned = [0, 0x10000, 0, 0xFFFF0000, 0, 0, 0, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big") for n in turned)
    path.write_bytes(data)
    found = next(frames(path)).image
    assert found.shape == (64, 48, 3)
    corners = [found[y, x, 0] > 128 for y, x in [(8, 8), (8, 40), (56, 8), (56, 40)]]
    assert corners == [False, True, False, False]


def test_what_is_not_a_video_is_the_users_error(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video at all")
    sound = tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    whole = write(tmp_path / "whole.mp4", [grey(level) for level in range(40, 49)])
    cut = tmp_path / "cut.mp4"  # without its index
    cut.write_bytes(whole.read_bytes()[:400])
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (text, sound, cut, empty, tmp_path / "missing.mp4"):
        with pytest.raises(UserError) as error:
            list(frames(path))
        assert str(path) in str(error.value) and "expected" in str(error.value)


def test_a_damaged_video_is_the_users_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(
        tmp_path / "a.mp4", [rng.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(9)]
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="frame"):
        list(frames(path))
