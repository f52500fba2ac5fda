"""Frames in and video out, one at a time: memory does not grow with their number."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from pipeline.data.files import atomic_path, list_images, read_image
from pipeline.errors import UserError

BT709 = 1  # FFmpeg's number for the primaries and the transfer curve of ITU-R BT.709


@dataclass(frozen=True)
class Frame:
    """An image of a folder or a frame of a video. Ids count from 1 in the order of the source."""

    image_id: int
    name: str  # the file's name, or <video stem>_000123 with the frame's index from 0
    image: np.ndarray  # (height, width, 3) uint8 BGR


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video file says."""

    codec: str
    pixel_format: str
    width: int
    height: int
    fps: Fraction
    frames: int  # 0: the file does not say


def frames(source: Path) -> Iterator[Frame]:
    """The images of a folder, by name, or the frames of a video.

    Raises `UserError` when there are none, or one cannot be decoded.
    """
    if source.is_dir():
        paths = list_images(source)
        if not paths:
            raise UserError(f"{source}: expected a folder of images, found none in it")
        for image_id, path in enumerate(paths, start=1):
            yield Frame(image_id, path.name, read_image(path))
        return
    index = -1
    with _open_video(source) as (container, stream):
        stream.thread_type = "AUTO"
        try:
            for index, frame in enumerate(container.decode(stream)):
                # The turn that players apply to, say, a telephone's upright recording.
                image = np.rot90(frame.to_ndarray(format="bgr24"), frame.rotation // 90)
                name = f"{source.stem}_{index:06d}"
                yield Frame(index + 1, name, np.ascontiguousarray(image))
        except av.FFmpegError as error:
            raise UserError(
                f"{source}: frame {index + 1}: expected a frame, found {error}"
            ) from None
    if index < 0:
        raise UserError(f"{source}: expected a video with frames, found none in it")


def count_frames(source: Path) -> int | None:
    """How many frames `frames` will give; None if the video does not say beforehand."""
    return len(list_images(source)) if source.is_dir() else probe(source).frames or None


def probe(path: Path) -> VideoInfo:
    """Read the header of a video. Raises `UserError` when it is missing or not a video."""
    with _open_video(path) as (_, stream):
        context = stream.codec_context
        return VideoInfo(
            context.name,
            context.pix_fmt or "",
            context.width,
            context.height,
            Fraction(stream.average_rate or stream.guessed_rate or 25),
            stream.frames,
        )


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


class VideoWriter:
    """Encodes frames to H.264 in MP4 as browsers play it: yuv420p, BT.709, index before the data.

    Used as `with VideoWriter.create(path, fps) as video: video.write(image)`.
    """

    def __init__(self, container: av.container.OutputContainer, fps: Fraction) -> None:
        self.frames = 0  # written so far
        self._container = container
        self._fps = fps
        self._size: tuple[int, int] | None = None
        self._stream: VideoStream | None = None

    @classmethod
    @contextmanager
    def create(cls, path: Path, fps: Fraction) -> Iterator[VideoWriter]:
        """Open a video whose file appears when the block has ended well, complete and probed.

        Raises `ValueError` when no frame was written.
        """
        with atomic_path(path) as temporary:
            with av.open(
                str(temporary), "w", "mp4", options={"movflags": "+faststart"}
            ) as container:
                video = cls(container, fps)
                yield video
                video._finish()
            video._check(temporary)

    def write(self, image: np.ndarray, repeat: int = 1) -> None:
        """Add a (height, width, 3) uint8 BGR image, shown for `repeat` frames.

        All images have one size. H.264 in yuv420p needs even sides: an odd one gains one pixel, a
        copy of its last row or column. Each image starts with a keyframe if it is repeated, so that
        a player's seeking lands on it.
        """
        height, width = image.shape[:2]
        if self._stream is None:
            self._size = (height, width)
            self._stream = self._add_stream(width + width % 2, height + height % 2)
        elif self._size != (height, width):
            raise ValueError(f"expected an image of {self._size}, found one of {(height, width)}")
        even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="bgr24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.time_base = 1 / self._fps
        for i in range(repeat):
            frame.pts = self.frames
            frame.pict_type = PictureType.I if repeat > 1 and i == 0 else PictureType.NONE
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def _add_stream(self, width: int, height: int) -> VideoStream:
        stream = self._container.add_stream(
            "libx264", rate=self._fps, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = 1 / self._fps
        context = stream.codec_context
        context.gop_size = max(1, round(self._fps))  # a keyframe each second at least
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = BT709
        return stream

    def _finish(self) -> None:
        if self._stream is None:
            raise ValueError("expected at least one frame, found none")
        self._container.mux(self._stream.encode(None))

    def _check(self, path: Path) -> None:
        """Read back what was written. Raises `RuntimeError` when it is not what was asked for."""
        assert self._stream is not None
        found = probe(path)
        fps = found.fps if abs(found.fps / self._fps - 1) < 0.001 else self._fps  # MP4 rounds it
        size = self._stream.width, self._stream.height
        wanted = VideoInfo("h264", "yuv420p", *size, fps, self.frames)
        boxes = top_level_boxes(path)
        if found != wanted or boxes.index("moov") > boxes.index("mdat"):
            raise RuntimeError(f"{path}: expected {wanted}, found {found} with boxes {boxes}")


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    if not path.exists():
        raise UserError(f"{path}: expected a folder of images or a video, found nothing there")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: expected a video, found {error}") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{path}: expected a video, found a file without a video stream")
        yield container, container.streams.video[0]
