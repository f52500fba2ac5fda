"""Pictures out, one at a time: H.264 in MP4, VP9 in WebM, GIF, or numbered PNGs.

`create` gives the writer that a path's suffix asks for; all have one interface. Nothing is at the
path before everything is written and checked, and memory does not grow with the number of pictures.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.video.format import VideoFormat
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from pipeline.data.files import atomic_folder, unnamed_path

BT709 = 1  # FFmpeg's number for the primaries and the transfer curve of ITU-R BT.709


@dataclass(frozen=True)
class Chapter:
    """A part of a video that players list by its title. Chapters follow one another from 0 on."""

    title: str
    frames: int


@dataclass(frozen=True)
class Encoding:
    """A container and how its frames are encoded: FFmpeg's names."""

    container: str
    codec: str
    decoder: str
    options: Mapping[str, str]
    container_options: Mapping[str, str]


ENCODINGS = {
    # x264's fastest preset: at this quality its files are as large as those of MPEG-4 Part 2
    ".mp4": Encoding(
        "mp4",
        "libx264",
        "h264",
        {"crf": "23", "preset": "ultrafast"},
        {"movflags": "+faststart"},
    ),
    ".webm": Encoding(
        "webm",
        "libvpx-vp9",
        "vp9",
        {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "8", "row-mt": "1"},
        {},
    ),
}
SUFFIXES = (*ENCODINGS, ".gif", "")  # "": a folder of PNGs


class Writer(Protocol):
    """Takes pictures of one size."""

    def write(self, image: np.ndarray, repeat: int = 1) -> None:
        """Add a (height, width, 3) uint8 BGR image, shown for `repeat` frames.

        Raises `ValueError` if it is of another size than those before.
        """


@contextmanager
def create(path: Path, fps: Fraction, chapters: Sequence[Chapter] = ()) -> Iterator[Writer]:
    """Open what the suffix of `path` asks for; it appears when the block has ended well.

    MP4 and WebM have the `chapters`. Raises `ValueError` when no picture was written, or for a
    suffix that is not one of `SUFFIXES`.
    """
    suffix = path.suffix.lower()
    if suffix == "":
        with atomic_folder(path) as folder:
            pictures = PngWriter(folder)
            yield pictures
            _check_count(pictures.pictures)
    elif suffix == ".gif":
        with unnamed_path(path) as unnamed:
            with av.open(str(unnamed), "w", "gif", options={"loop": "0"}) as container:
                gif = GifWriter(container, fps)
                yield gif
                gif.finish()
            gif.check(unnamed)
    elif suffix in ENCODINGS:
        encoding = ENCODINGS[suffix]
        options = dict(encoding.container_options)
        with unnamed_path(path) as unnamed:
            with av.open(str(unnamed), "w", encoding.container, options=options) as container:
                video = VideoWriter(container, encoding, fps, chapters)
                yield video
                video.finish()
            video.check(unnamed)
    else:
        raise ValueError(f"expected a suffix of {', '.join(SUFFIXES)}, found {path.suffix}")


def recompress(source: Path, path: Path) -> None:
    """Encode an MP4 or WebM again, smaller, as H.264 in MP4, each frame and keyframe at its time.

    Where a video is kept beside pictures and passed on, size counts more than the time it takes.
    """
    with (
        unnamed_path(path) as unnamed,
        av.open(str(source)) as old,
        av.open(str(unnamed), "w", "mp4", options={"movflags": "+faststart"}) as new,
    ):
        read = old.streams.video[0]
        context = read.codec_context
        written = new.add_stream(
            "libx264", rate=read.average_rate, options={"crf": "26", "preset": "veryfast"}
        )
        assert isinstance(written, VideoStream)
        written.width, written.height, written.pix_fmt = context.width, context.height, "yuv420p"
        written.time_base = read.time_base
        to = written.codec_context
        to.colorspace, to.color_range = context.colorspace, context.color_range
        to.color_primaries, to.color_trc = context.color_primaries, context.color_trc
        for frame in old.decode(read):
            frame.pict_type = PictureType.I if frame.key_frame else PictureType.NONE
            new.mux(written.encode(frame))
        new.mux(written.encode(None))


class VideoWriter:
    """Encodes frames as browsers play them: yuv420p, BT.709; in MP4, the index before the data.

    yuv420p needs even sides: an odd one gains one pixel, a copy of its last row or column. Each
    image starts with a keyframe if it is repeated, so that a player's seeking lands on it.
    """

    def __init__(
        self,
        container: OutputContainer,
        encoding: Encoding,
        fps: Fraction,
        chapters: Sequence[Chapter],
    ) -> None:
        self.frames = 0  # written so far
        self._container, self._encoding, self._fps = container, encoding, fps
        self._size: tuple[int, int] | None = None
        self._stream: VideoStream | None = None
        container.set_chapters(_timed(chapters, fps))

    def write(self, image: np.ndarray, repeat: int = 1) -> None:
        height, width = image.shape[:2]
        if self._stream is None:
            self._size = (height, width)
            self._stream = self._add_stream(width + width % 2, height + height % 2)
        _check_size(image, self._size)
        if height % 2 or width % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="bgr24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.time_base = 1 / self._fps
        for i in range(repeat):
            frame.pts = self.frames
            frame.pict_type = PictureType.I if repeat > 1 and i == 0 else PictureType.NONE
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def _add_stream(self, width: int, height: int) -> VideoStream:
        encoding = self._encoding
        stream = self._container.add_stream(
            encoding.codec, rate=self._fps, options=dict(encoding.options)
        )
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = 1 / self._fps
        context = stream.codec_context
        context.gop_size = max(1, round(self._fps))  # a keyframe each second at least
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = BT709
        return stream

    def finish(self) -> None:
        """Encode what is left. Raises `ValueError` when nothing was written."""
        _check_count(self.frames)
        assert self._stream is not None
        self._container.mux(self._stream.encode(None))

    def check(self, path: Path) -> None:
        """Read back what was written. Raises `RuntimeError` when it is not what was asked for."""
        assert self._stream is not None
        size = self._stream.width, self._stream.height
        _check(path, self._encoding.decoder, size, self.frames)
        if self._encoding.container == "mp4":
            boxes = top_level_boxes(path)
            if boxes.index("moov") > boxes.index("mdat"):
                raise RuntimeError(f"{path}: expected moov before mdat, found {boxes}")


class GifWriter:
    """Writes an animated GIF that loops. Each picture has a palette of its own, of 256 colours.

    A repeated picture is stored once and stays longer. Times are rounded to hundredths of a second.
    """

    def __init__(self, container: OutputContainer, fps: Fraction) -> None:
        self.frames = 0  # of time, written so far
        self._pictures = 0  # in the file
        self._container, self._fps = container, fps
        self._size: tuple[int, int] | None = None
        self._stream: VideoStream | None = None
        self._last: np.ndarray | None = None
        self._graph = av.filter.Graph()

    def write(self, image: np.ndarray, repeat: int = 1) -> None:
        if self._stream is None:
            self._size = image.shape[:2]
            self._stream = self._add_stream(image.shape[1], image.shape[0])
        _check_size(image, self._size)
        self._encode(image, self.frames)
        self.frames += repeat
        self._last = image if repeat > 1 else None

    def _encode(self, image: np.ndarray, time: int) -> None:
        assert self._stream is not None
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="bgr24")
        frame.pts, frame.time_base = time, 1 / self._fps
        self._graph.push(frame)
        self._pull()
        self._pictures += 1

    def _pull(self) -> None:
        assert self._stream is not None
        while True:
            try:
                reduced = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(reduced, av.VideoFrame)
            self._container.mux(self._stream.encode(reduced))

    def _add_stream(self, width: int, height: int) -> VideoStream:
        """The stream, and the filters before it: the colours of a picture, and their dithering."""
        stream = self._container.add_stream("gif", rate=self._fps)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        stream.time_base = 1 / self._fps
        graph = self._graph
        source = graph.add_buffer(
            width=width, height=height, format=VideoFormat("bgr24"), time_base=1 / self._fps
        )
        split, sink = graph.add("split"), graph.add("buffersink")
        palette = graph.add("palettegen", "stats_mode=single")
        reduce = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(reduce, 1, 0)
        palette.link_to(reduce, 0, 1)
        reduce.link_to(sink)
        graph.configure()
        return stream

    def finish(self) -> None:
        """Encode what is left. Raises `ValueError` when nothing was written."""
        _check_count(self.frames)
        assert self._stream is not None
        if self._last is not None:  # a picture lasts until the next one: so the last is two
            self._encode(self._last, self.frames - 1)
        self._graph.push(None)
        self._pull()
        self._container.mux(self._stream.encode(None))

    def check(self, path: Path) -> None:
        """Read back what was written. Raises `RuntimeError` when it is not what was asked for."""
        assert self._stream is not None
        _check(path, "gif", (self._stream.width, self._stream.height), self._pictures)


class PngWriter:
    """Writes 000001.png, 000002.png, ...: each picture once, however long it is to be shown."""

    def __init__(self, folder: Path) -> None:
        self.pictures = 0  # written so far
        self._folder = folder
        self._size: tuple[int, int] | None = None

    def write(self, image: np.ndarray, repeat: int = 1) -> None:
        self._size = self._size or image.shape[:2]
        _check_size(image, self._size)
        encoded = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
        self.pictures += 1
        (self._folder / f"{self.pictures:06d}.png").write_bytes(encoded.tobytes())


def top_level_boxes(path: Path) -> list[str]:
    """The types of an MP4 file's top-level boxes in order (ISO/IEC 14496-12, section 4.2)."""
    boxes = []
    with path.open("rb") as file:
        while len(header := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", header)
            boxes.append(kind.decode("latin-1"))
            if size == 0:  # the box goes on to the end of the file
                break
            skip = struct.unpack(">Q", file.read(8))[0] - 16 if size == 1 else size - 8
            file.seek(skip, 1)
    return boxes


def _timed(chapters: Sequence[Chapter], fps: Fraction) -> list[Any]:
    """Chapters as PyAV takes them, in milliseconds."""
    ends = np.cumsum([chapter.frames for chapter in chapters]).tolist()
    times = [round(frame / fps * 1000) for frame in (0, *ends)]
    return [
        {
            "id": i,
            "start": times[i],
            "end": times[i + 1],
            "time_base": Fraction(1, 1000),
            "metadata": {"title": chapter.title},
        }
        for i, chapter in enumerate(chapters)
    ]


def _check_size(image: np.ndarray, size: tuple[int, ...] | None) -> None:
    if image.shape[:2] != size:
        raise ValueError(f"expected an image of {size}, found one of {image.shape[:2]}")


def _check_count(count: int) -> None:
    if not count:
        raise ValueError("expected at least one frame, found none")


def _check(path: Path, codec: str, size: tuple[int, int], frames: int) -> None:
    """Compare what a file says of itself, and the frames in it, with what was written."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        found = context.name, (context.width, context.height)
        counted = sum(1 for packet in container.demux(stream) if packet.size)
    if (*found, counted) != (codec, size, frames):
        raise RuntimeError(f"{path}: expected {(codec, size, frames)}, found {(*found, counted)}")
