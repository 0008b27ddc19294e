"""Decode a picture of any kind into upright RGB."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

# Left out: formats that start another program (EPS, WMF) or that have no mark to be known by (TGA). The last two come
# with plugins, if those are registered.
FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI"),
    *("HEIF", "JXL"),
)

# What Pillow's decoders raise on bytes that are not what they promise.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
)
_ORIENTATION = 0x0112


def decode(stream: IO[bytes], name: str, *, max_pixels: int) -> Image:
    """The first frame of an encoded picture, upright RGB. ``name`` goes into messages. Raises ``MediaError``."""
    from PIL import Image, UnidentifiedImageError

    _check_start(stream, name)
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it can read past
            with Image.open(stream, formats=known) as image:
                _check_size(image.size, name, max_pixels)
                image.load()
                return upright_rgb(image)
    except Image.DecompressionBombError as error:
        raise MediaError(_too_large(name, max_pixels)) from error
    except UNREADABLE as error:
        known_why = str(error) and not isinstance(error, UnidentifiedImageError)
        reason = f" ({str(error).splitlines()[0][:80]})" if known_why else ""
        raise MediaError(
            f"{name} is not a picture that can be read{reason}: "
            "check that it is whole, and convert it to PNG or JPEG"
        ) from error


def from_image(image: Image, *, max_pixels: int) -> Image:
    """A Pillow image of any mode, upright RGB; the given one stays as it is.

    Only an image straight from a file is turned: one that was worked on keeps the tag, whatever was done to it.
    """
    _check_size(image.size, "the given image", max_pixels)
    try:
        image.load()
        if image.format is not None:
            return upright_rgb(image)
        return image.copy() if image.mode == "RGB" else _rgb(image)
    except UNREADABLE as error:
        raise MediaError(f"the given image can't be read ({error}): check that its file is whole") from error


def from_array(array: Any, *, max_pixels: int) -> Image:
    """An array ``[H, W]`` or ``[H, W, 1 | 3 | 4]`` (numpy or MLX), uint8, or floats from 0 to 1."""
    from PIL import Image

    pixels = as_uint8(array)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)) or 0 in pixels.shape:
        raise MediaError(f"an array of shape {list(pixels.shape)} is no picture: give [height, width, 3]")
    _check_size((pixels.shape[1], pixels.shape[0]), "the given array", max_pixels)
    return upright_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def as_uint8(array: Any) -> NDArray[np.uint8]:
    """Pixel values of any array as bytes: uint8 as they are, floats from 0 to 1 spread to 0..255."""
    if "bfloat16" in str(array.dtype):  # numpy has no such type
        import mlx.core as mx

        array = array.astype(mx.float32)
    values: NDArray[Any] = np.array(array)
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise MediaError(f"pixels of type {values.dtype} are not known: give uint8, or floats from 0 to 1")
    if values.size and not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
        raise MediaError("float pixels must lie between 0 and 1: divide them by 255, or give uint8")
    return _bytes(values)


def _bytes(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return levels


def upright_rgb(image: Image) -> Image:
    """Turned as its EXIF tag says, transparency laid on white, 16-bit grey brought to 8 bits."""
    return _rgb(_upright(image))


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _from_deep_grey(image: Image) -> Image:
    from PIL import Image

    values = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        values = np.nan_to_num(values)
        top = 1.0 if values.max() <= 1 else 255.0  # the two ranges that are in use
    else:
        top = 65535.0
    return Image.fromarray(_bytes(values / top)).convert("RGB")


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    except UNREADABLE:
        return image  # a damaged EXIF block does not make the picture worthless
    return image if turn is None else image.transpose(turn)


def _check_start(stream: IO[bytes], name: str) -> None:
    start = stream.read(512)
    stream.seek(0)
    if not start:
        raise MediaError(f"{name} is empty: fetch or save it again")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise MediaError(f"{name} is a web page, not a picture: give the address of the picture itself")


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise MediaError(_too_large(name, max_pixels, size))
    if 0 in size:
        raise MediaError(f"{name} has no pixels: give another picture")


def _too_large(name: str, max_pixels: int, size: tuple[int, int] | None = None) -> str:
    extent = f"{size[0]}x{size[1]} pixels: " if size else ""
    return f"{name}: {extent}more than {max_pixels // 1_000_000} megapixels are not decoded: make it smaller"
