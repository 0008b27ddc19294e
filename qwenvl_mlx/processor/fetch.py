"""From what a message names as its picture or video to the picture, or to the video's file or bytes."""

from __future__ import annotations

import base64
import binascii
import io
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

from qwenvl_mlx.errors import MediaError, PromptError
from qwenvl_mlx.processor import picture
from qwenvl_mlx.processor.download import download
from qwenvl_mlx.processor.policy import FetchPolicy

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FetchPolicy", "load_image", "local_path_or_bytes", "name_of", "source_of"]


def source_of(part: Mapping[str, Any], kind: str) -> Any:
    """What a message part of ``kind`` "image" or "video" names as its source; ``PromptError`` if it names none.

    Takes ``{"image": x}``, ``{"image_url": x}`` and ``{"image_url": {"url": x}}``, and bare ``url`` or ``path`` keys.
    """
    for key in (kind, f"{kind}_url", "url", "path"):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            return value
    raise PromptError(f'a part of type "{part.get("type", kind)}" names no {kind}: give it as "{kind}"')


def load_image(source: Any, *, policy: FetchPolicy | None = None) -> Image:
    """A picture as RGB, upright, transparency laid on white; of an animation the first frame.

    ``source``: path (``~`` is expanded), ``file:``, ``http(s):`` or data URI, bytes, Pillow image, or an array
    ``[H, W, 3 | 4 | 1]`` (numpy or MLX; uint8, or floats from 0 to 1). Raises ``MediaError`` naming the source.
    """
    from PIL.Image import Image

    policy = policy or FetchPolicy()
    if isinstance(source, Image):
        return picture.from_image(source, max_pixels=policy.max_pixels)
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return picture.from_array(source, max_pixels=policy.max_pixels)
    name, found = name_of(source), local_path_or_bytes(source, policy=policy)
    if isinstance(found, bytes):
        return picture.decode(io.BytesIO(found), name, max_pixels=policy.max_pixels)
    try:
        with found.open("rb") as stream:
            return picture.decode(stream, name, max_pixels=policy.max_pixels)
    except OSError as error:
        raise MediaError(f"{name} can't be read ({error.strerror}): check its permissions") from error


def local_path_or_bytes(source: Any, *, policy: FetchPolicy | None = None) -> Path | bytes:
    """An existing file for a path or ``file:`` URI; the bytes of anything that is not a local file."""
    policy = policy or FetchPolicy()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Path):
        return _file(source, policy)
    if not isinstance(source, str):
        raise MediaError(
            f"a {type(source).__name__} is no picture or video: give a path, URL, bytes, image or array"
        )
    if not source.strip():
        raise MediaError("the path of a picture or video is empty: give one")
    scheme = source[:16].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return download(source, policy)
    if scheme == "data":
        return _data(source, policy)
    if scheme == "file":
        return _file(_file_uri(source), policy)
    if "://" in source[:32] and scheme.isalnum():
        raise MediaError(
            f"{name_of(source)}: {scheme}: is not fetched: give a path, an http(s) URL or a data URI"
        )
    return _file(Path(source), policy)


def name_of(source: Any) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, (str, Path)):
        text = " ".join(str(source).splitlines())
        if text[:5].lower() == "data:":
            return f"the data URI {text[:24]}..."
        return text if len(text) <= 100 else f"{text[:60]}...{text[-37:]}"
    return f"the given {type(source).__name__}"


def _file(path: Path, policy: FetchPolicy) -> Path:
    policy.check_file(path)
    name = name_of(path)
    try:
        path = path if path.exists() else path.expanduser()
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise MediaError(f"{name} does not exist: check the path") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name of nobody
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{name} can't be opened ({reason}): check the path") from error
    if not stat.S_ISREG(mode):
        raise MediaError(f"{name} is not a file: give the path of a picture or video")
    return path


def _file_uri(uri: str) -> Path:
    rest = uri[len("file:") :]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest)
    if host not in ("", "localhost"):
        raise MediaError(f"{name_of(uri)} names another computer: write file:///absolute/path")
    return Path(url2pathname(slash + path))


def _data(uri: str, policy: FetchPolicy) -> bytes:
    name = name_of(uri)
    head, comma, body = uri.partition(",")
    if not comma:
        raise MediaError(f"{name} has no comma: write data:image/png;base64,...")
    if len(body) > policy.max_bytes * 4 // 3 + 4:
        raise MediaError(f"{name} is larger than {policy.max_bytes >> 20} MiB: send a smaller file")
    content = unquote_to_bytes(body.encode(errors="replace"))
    if not head.lower().endswith(";base64"):
        return content
    try:
        compact = b"".join(content.split())
        return base64.b64decode(
            compact + b"=" * (-len(compact) % 4), altchars=_altchars(compact), validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{name} is not valid base64: encode the file again") from error


def _altchars(body: bytes) -> bytes:
    """URL-safe base64 is in use as well."""
    return b"-_" if b"-" in body or b"_" in body else b"+/"
