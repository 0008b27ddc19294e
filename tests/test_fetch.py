"""Pictures come from anywhere and of any mode; whatever can't be had ends in one MediaError that says the cure."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import reference
from PIL import Image

from qwenvl_mlx.errors import MediaError, PromptError
from qwenvl_mlx.processor.fetch import FetchPolicy, load_image, local_path_or_bytes, source_of

RED = (200, 30, 40)
PLACES = {"/hop": "/picture", "/loop": "/loop", "/file": "file:///etc/passwd", "/ftp": "ftp://localhost/a"}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


class Pages(http.server.BaseHTTPRequestHandler):
    """A picture, what is no picture, and the redirects of ``PLACES``."""

    png = b""

    def do_GET(self) -> None:
        if self.path in PLACES:
            self.send_response(302)
            self.send_header("Location", PLACES[self.path])
            self.end_headers()
            return
        if self.path.startswith("/slow"):
            self.drip(b"HTTP/1.1 200 OK\r\nX: " if self.path == "/slow-head" else b"HTTP/1.1 200 OK\r\n\r\n")
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        body = {"/page": b"<!DOCTYPE html><html></html>", "/empty": b"", "/big": bytes(5000)}.get(
            self.path, self.png
        )
        self.send_response(200)
        self.send_header(
            "Content-Type", "text/plain"
        )  # wrong on purpose: the content decides, not the header
        self.send_header("Content-Length", str(len(body) + (10 if self.path == "/broken" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, start: bytes) -> None:
        with contextlib.suppress(OSError):  # the other side hangs up
            for piece in (start, *[b"x"] * 40):
                self.wfile.write(piece)
                time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(picture: Image.Image) -> Iterator[str]:
    handler = type("Handler", (Pages,), {"png": encoded(picture)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_every_kind_of_source_gives_the_same_pixels(
    picture: Image.Image, tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture)
    path = tmp_path / "图 1#a?.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = base64.b64encode(data).decode()
    array = np.asarray(picture)
    sources = [
        path,
        str(path),
        "~/图 1#a?.png",
        path.as_uri(),
        f"file://{path}",
        f"{site}/picture",
        f"{site}/hop",
        f"{site}/图 1.png?a=b c",
        f"data:image/png;base64,{code}",
        f"data:;base64,{base64.urlsafe_b64encode(data).decode().rstrip('=')}",
        f"data:image/png;base64,{code[:40]}\n{code[40:]}",
        data,
        bytearray(data),
        picture,
        array,
        array.astype(np.float32) / 255,
        array.astype(np.float64) / 255,
        mx.array(array),
        mx.array(array.astype(np.float32) / 255),
    ]
    for source in sources:
        np.testing.assert_array_equal(pixels(load_image(source)), array, err_msg=str(source)[:60])


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (3, 2), (*RED, 0))
    half.putpixel((0, 0), (*RED, 255))
    half.putpixel((1, 0), (0, 0, 0, 51))
    grey_alpha = Image.new("LA", (3, 2), (0, 0))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([*RED, 0, 0, 0])
    keyed = Image.new("RGB", (3, 2), RED)
    assert load_image(half).getpixel((0, 0)) == RED
    assert load_image(half).getpixel((1, 0)) == (204, 204, 204)
    assert load_image(half).getpixel((2, 1)) == (255, 255, 255)
    assert load_image(np.asarray(half)).getpixel((2, 1)) == (255, 255, 255)
    assert load_image(grey_alpha).getpixel((1, 1)) == (255, 255, 255)
    assert load_image(encoded(palette, transparency=1)).getpixel((1, 1)) == (255, 255, 255)
    assert load_image(encoded(palette, transparency=0)).getpixel((1, 1)) == (0, 0, 0)
    assert load_image(encoded(keyed, transparency=RED)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_pictures_are_put_upright(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (32, 16), (255, 255, 255))
    upright.paste((0, 0, 0), (0, 0, 16, 8))  # black top left
    method = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # how a camera stores it
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {}
    stored = upright if method is None else upright.transpose(Image.Transpose(method))
    got = load_image(encoded(stored, kind, exif=exif, **options))
    np.testing.assert_allclose(pixels(got).astype(int), pixels(upright).astype(int), atol=3)


def test_an_image_that_was_worked_on_is_taken_as_it_lies() -> None:
    """Turning or converting an image leaves the marks of its file on it."""
    for name in ("exif_rot.jpg", "palette.png", "rgba.png"):
        with Image.open(reference(f"qwen_vl/images/{name}")) as opened:
            rgb = opened.convert("RGB")
            assert load_image(rgb).tobytes() == rgb.tobytes()
            assert load_image(opened).tobytes() == load_image(reference(f"qwen_vl/images/{name}")).tobytes()
            assert load_image(opened).tobytes() != rgb.tobytes()


def test_deep_grey_is_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    assert pixels(load_image(encoded(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(load_image(encoded(deep, "TIFF")))[0, :, 0].tolist() == [0, 1, 128, 255]
    light = Image.fromarray(np.array([[0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert pixels(load_image(encoded(light, "TIFF")))[0, :, 2].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA", "HSV"])
def test_every_mode_becomes_rgb_and_the_given_image_stays(mode: str, picture: Image.Image) -> None:
    given = picture.convert(mode)
    assert load_image(given).size == picture.size
    assert given.mode == mode
    assert load_image(given) is not given


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in [(255, 0, 0), (0, 255, 0)]]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_every_reference_picture_loads() -> None:
    for path in sorted(reference("qwen_vl/images").rglob("*.*")):
        assert load_image(path).mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header announces more than it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "empty"),
        (b"not a picture at all", "PNG or JPEG"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (bomb(10_001, 10_000), "100 megapixels"),
        (bomb(100_000, 100_000), "100 megapixels"),
        (bomb(9_500, 10_000), "whole"),  # allowed by its header (Pillow alone would warn), but has no pixels
        ("/no/such/picture.png", "does not exist"),
        ("~nobody-of-this-name/x.png", "check the path"),
        ("/", "not a file"),
        ("", "is empty"),
        ("a\0b.png", "check the path"),
        ("x" * 5000, "check the path"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "PNG or JPEG"),
        ("ftp://example.test/a.png", "ftp"),
        ("file://elsewhere/a.png", "file:///"),
        ("http://", "check the address"),
        ("http://[::1/a.png", "check the address"),
        ("http://localhost:99999/a.png", "check the address"),
        ("http://127.0.0.1:9/a.png", "network"),
        (np.zeros((3, 10, 10), np.uint8), "height, width, 3"),
        (np.zeros((0, 10, 3), np.uint8), "height, width, 3"),
        (np.full((4, 4, 3), 200.0), "divide them by 255"),
        (np.full((4, 4, 3), np.nan), "between 0 and 1"),
        (np.zeros((4, 4, 3), np.int32), "uint8"),
        (np.array(["x"]), "uint8"),
        (object(), "give a path"),
        (None, "give a path"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, (str, bytes)) else type(value).__name__,
)
def test_bad_sources_say_the_cure(source: object, says: str) -> None:
    with pytest.raises(MediaError, match=says) as caught:
        load_image(source)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_truncated_picture_is_refused(picture: Image.Image, tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        data = encoded(picture.resize((64, 64)), kind)
        (tmp_path / "half").write_bytes(data[: len(data) // 2])
        with pytest.raises(MediaError, match=r"half.*whole"):
            load_image(tmp_path / "half")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing", "404"),
        ("/page", "web page"),
        ("/empty", "empty"),
        ("/loop", "redirects too often"),
        ("/file", "not allowed"),
        ("/ftp", "only http and https"),
        ("/broken", "broke off"),
    ],
)
def test_bad_answers_of_a_site(site: str, path: str, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        load_image(site + path)


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_slow_sender_can_not_outlast_the_limit(site: str, path: str, public: bool) -> None:
    class Local(FetchPolicy):
        def allows_address(self, address: object) -> bool:
            return True

    began = time.monotonic()
    with pytest.raises(MediaError, match=r"longer than 0.3 s"):
        load_image(site + path, policy=Local(timeout=0.3, public_only=public))
    assert time.monotonic() - began < 2


def test_a_policy_limits_what_is_fetched(site: str, tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    refused = [
        (f"{site}/picture", FetchPolicy(public_only=True), "public internet"),
        ("http://localhost:1/a.png", FetchPolicy(public_only=True), "public internet"),
        ("http://[::ffff:127.0.0.1]:1/a.png", FetchPolicy(public_only=True), "public internet"),
        ("https://169.254.169.254/a.png", FetchPolicy(public_only=True), "public internet"),
        (f"{site}/picture", FetchPolicy(urls=False), "data URI"),
        (f"{site}/hop", FetchPolicy(redirects=0), "redirects"),
        (f"{site}/big", FetchPolicy(max_bytes=1000), "larger"),
        (f"data:;base64,{'A' * 4000}", FetchPolicy(max_bytes=1000), "larger"),
        (str(path), FetchPolicy(files=False), "local files"),
        (path.as_uri(), FetchPolicy(files=False), "local files"),
        (str(path), FetchPolicy(max_pixels=10), "megapixels"),
        (np.zeros((9, 9, 3), np.uint8), FetchPolicy(max_pixels=10), "megapixels"),
    ]
    for source, policy, says in refused:
        with pytest.raises(MediaError, match=says):
            load_image(source, policy=policy)


def test_videos_stay_files_or_bytes(tmp_path: Path, site: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"film")
    assert local_path_or_bytes(str(path)) == path
    assert local_path_or_bytes(path.as_uri()) == path
    assert local_path_or_bytes("data:video/mp4;base64,ZmlsbQ==") == b"film"
    assert local_path_or_bytes(f"{site}/big") == bytes(5000)


def test_a_part_names_its_source() -> None:
    assert source_of({"type": "image", "image": "a"}, "image") == "a"
    assert source_of({"type": "image_url", "image_url": {"url": "b"}}, "image") == "b"
    assert source_of({"type": "image_url", "image_url": "b"}, "image") == "b"
    assert source_of({"type": "video_url", "video_url": {"url": "c"}}, "video") == "c"
    with pytest.raises(PromptError, match="names no image"):
        source_of({"type": "image"}, "image")


def test_no_bytes_raise_anything_but_a_media_error() -> None:
    rng = random.Random(0)
    whole = [path.read_bytes() for path in sorted(reference("qwen_vl/images").rglob("*.*"))]
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    whole += [encoded(noise, kind) for kind in ("TIFF", "BMP", "PPM", "ICO", "JPEG2000", "AVIF", "QOI")]
    whole.append(encoded(noise, "TIFF", compression="tiff_lzw"))
    heads = [
        b"",
        b"II*\0",
        b"BM",
        b"P6 ",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
    ]
    for _ in range(400):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(min(len(data), rng.choice([64, 400, len(data)])))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data) + 1)]
        _load_or_media_error(bytes(data))
        _load_or_media_error(rng.choice(heads) + rng.randbytes(rng.randrange(200)))


def test_no_text_raises_anything_but_a_media_error() -> None:
    rng = random.Random(0)
    starts = [
        "",
        "/",
        "~",
        "file:",
        "file://",
        "data:",
        "data:image/png;base64,",
        "x://",
        "//",
        "C:\\",
        "localhost",
    ]
    letters = "a/\\:;,%#?[]@~. \n\0é图\ud800=+-_0\t"
    for _ in range(1500):
        source = rng.choice(starts) + "".join(rng.choices(letters, k=rng.randrange(12)))
        with pytest.raises(MediaError) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)


def _load_or_media_error(data: bytes) -> None:
    try:
        image = load_image(data, policy=FetchPolicy(max_pixels=4_000_000))
    except MediaError:
        return
    assert image.mode == "RGB"
