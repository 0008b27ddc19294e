"""Where a video's frames come from: a file, an animation, a list of pictures, an array."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from PIL import Image, ImageSequence

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.processor import picture
from qwenvl_mlx.processor.fetch import load_image, local_path_or_bytes, name_of
from qwenvl_mlx.processor.policy import FetchPolicy

# Playlists, session descriptions and the like make FFmpeg open other files and URLs: only files that hold the video
# themselves are read.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,m4v,av1,obu,ivf,wav"
SAFE = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}

ANIMATIONS = ("GIF", "WEBP", "PNG")


class ShortVideo(Exception):
    """A file holds fewer frames than it announced; ``frames`` is how many came."""

    def __init__(self, frames: int) -> None:
        self.frames = frames


@dataclass(frozen=True)
class Frames(ABC):
    """``total`` frames at ``fps`` a second (None: unknown). ``sampled``: they were chosen already, take them all."""

    name: str
    total: int
    fps: float | None
    sampled: bool

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of ascending ``indices`` as upright RGB, one at a time. Raises ``MediaError``, ``ShortVideo``."""

    def shortened(self, total: int) -> Frames:
        return replace(self, total=total)


def open_frames(source: Any, *, fps: float | None, policy: FetchPolicy | None = None) -> Frames:
    """``source``: a path, URL, data URI or bytes of a video or animation; or frames, as a list or array.

    ``fps``: how a list or array was sampled; it means nothing here for a file. Raises ``MediaError``.
    """
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        if len(source.shape) != 4:
            raise MediaError(
                f"an array of shape {list(source.shape)} is no video: give [frames, height, width, 3]"
            )
        return Pictures("the given array", int(source.shape[0]), fps, True, source, policy)
    if isinstance(source, (list, tuple)):
        return Pictures("the list of frames", len(source), fps, True, source, policy)
    policy = policy or FetchPolicy()
    found = local_path_or_bytes(source, policy=policy)
    kind = Animation if _is_animation(found) else VideoFile
    return kind.open(found, name_of(source), max_pixels=policy.max_pixels)


@dataclass(frozen=True)
class Pictures(Frames):
    """Frames that somebody else took from a video."""

    pictures: Any
    policy: FetchPolicy | None

    def take(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            yield load_image(self.pictures[index], policy=self.policy)


@dataclass(frozen=True)
class Animation(Frames):
    """A GIF, an animated WebP or PNG."""

    data: Path | bytes
    max_pixels: int

    @classmethod
    def open(cls, data: Path | bytes, name: str, *, max_pixels: int) -> Animation:
        try:
            with _stream(data) as file, Image.open(file, formats=ANIMATIONS) as image:
                times = [_milliseconds(frame, name, max_pixels) for frame in ImageSequence.Iterator(image)]
        except (Image.DecompressionBombError, *picture.UNREADABLE) as error:
            raise _unreadable(name, error) from error
        fps = len(times) / sum(times) * 1000 if sum(times) else None
        return cls(name, len(times), fps, False, data, max_pixels)

    def take(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        try:
            with _stream(self.data) as file, Image.open(file, formats=ANIMATIONS) as image:
                for index in indices:
                    image.seek(index)
                    image.load()  # its mode may change by that
                    yield picture.upright_rgb(image)
        except picture.UNREADABLE as error:
            raise _unreadable(self.name, error) from error


@dataclass(frozen=True)
class VideoFile(Frames):
    """Anything that FFmpeg reads; decoded as a stream, so that only the wanted frames are ever held."""

    data: Path | bytes
    max_pixels: int

    @classmethod
    def open(cls, data: Path | bytes, name: str, *, max_pixels: int) -> VideoFile:
        av = _pyav()
        try:
            with _stream(data) as file, av.open(file, options=SAFE) as container:
                stream = _video_stream(container, name)
                _check_size(stream.codec_context, name, max_pixels)
                total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
                rate = stream.average_rate or stream.guessed_rate
        except (av.FFmpegError, OSError, ValueError) as error:
            raise _unreadable(name, error) from error
        return cls(name, total, float(rate) if rate else None, False, data, max_pixels)

    def take(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        av = _pyav()
        wanted, position, decoded = list(indices), 0, 0
        try:
            with _stream(self.data) as file, av.open(file, options=SAFE) as container:
                stream = _video_stream(container, self.name)
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    _check_size(frame, self.name, self.max_pixels)
                    while position < len(wanted) and wanted[position] == decoded:
                        yield _upright(frame)
                        position += 1
                    decoded += 1
                    if position == len(wanted):
                        return
        except (av.FFmpegError, OSError, ValueError) as error:
            if not decoded:
                raise _unreadable(self.name, error) from error
        raise ShortVideo(decoded)


def _milliseconds(frame: Image.Image, name: str, max_pixels: int) -> float:
    _check_size(frame, name, max_pixels)  # each one: frames of a GIF may stick out and enlarge it
    frame.load()  # a WebP knows only then
    return float(frame.info.get("duration", 0))


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise MediaError('videos need PyAV: pip install "qwenvl-mlx[video]"') from error
    return av


def _video_stream(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise MediaError(f"{name} has no video track: give another file")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError(f"{name} is coded in a way that FFmpeg does not know: convert it to MP4")
    return stream


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as the file says: the angle counts counterclockwise, as Pillow's turns do."""
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    image: Image.Image = frame.to_image()
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _is_animation(data: Path | bytes) -> bool:
    if isinstance(data, Path):
        with data.open("rb") as stream:
            start = stream.read(16)
    else:
        start = data[:16]
    return start.startswith((b"GIF8", b"\x89PNG")) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _stream(data: Path | bytes) -> IO[bytes]:
    return data.open("rb") if isinstance(data, Path) else io.BytesIO(data)


def _check_size(frame: Any, name: str, max_pixels: int) -> None:
    """``frame``: anything with a width and a height."""
    width, height = frame.width, frame.height
    if width * height > max_pixels:
        raise MediaError(
            f"{name}: {width}x{height} pixels: more than {max_pixels // 1_000_000} megapixels are not decoded: "
            "make it smaller"
        )


def _unreadable(name: str, error: Exception) -> MediaError:
    reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
    return MediaError(
        f"{name} is not a video that can be read ({reason}): check that it is whole, or convert it to MP4"
    )
