"""Hostile requests: each is answered with a 4xx in OpenAI's shape, at once, and the server lives on."""

from __future__ import annotations

import io
import socket
import struct
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA, reference
from serving import (
    CHAT,
    STRICT,
    EchoEngine,
    as_uri,
    asking,
    echo_shelf,
    file_server,
    image,
    post,
    processor_of,
    refused,
    serving,
)

from qwenvl_mlx.server import protocol
from qwenvl_mlx.server.guard import host_name, is_loopback
from qwenvl_mlx.server.media import CHARACTERS_OF_A_TOKEN
from qwenvl_mlx.server.settings import Settings

PACKED = zlib.compress(bytes(100_000_000), 9)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, more: bytes = b"") -> bytes:
    """A small file that announces a large picture."""
    row = zlib.compress(b"\0" * 100_000, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", row) + chunk(b"IEND", b"")


# -- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "\xc3\x28", "messages": []}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"model": "m", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m", "seed": ' + b"9" * 6000 + b', "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "m", "max_tokens": 1.5, "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
        b'{"model": "m", "messages": ' + b'[{"role":' * 5000,
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": '
        + b'{"a":' * 500
        + b"1"
        + b"}" * 501,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_broken_and_deeply_nested_json(strict_url: str, body: bytes) -> None:
    refused(strict_url, body)


def test_schemas_nested_as_deeply_as_json_may_be(strict_url: str) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}}
    wanted = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    text = {"type": "text", "text": "say:x"}
    status, reply = post(strict_url + CHAT, asking(text, response_format=wanted))
    assert status in (200, 400), reply
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    status, reply = post(strict_url + CHAT, asking(text, tools=[tool]))
    assert status in (200, 400), reply


def test_a_lone_surrogate_is_no_fault_of_the_server(strict_url: str) -> None:
    status, _ = post(
        strict_url + CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "say:\\ud800"}]}'
    )
    assert status in (200, 400)


def test_other_content_types_are_refused(strict_url: str) -> None:
    """A page elsewhere may post these without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert (
            post(strict_url + CHAT, asking({"type": "text", "text": "say:x"}), **{"Content-Type": kind})[0]
            == 415
        )


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_bodies_that_are_too_large(strict_url: str) -> None:
    assert "larger than" in refused(strict_url, b" " * (STRICT.body_bytes + 1))


def test_a_body_that_says_nothing_of_its_size(strict_url: str) -> None:
    host, port = strict_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        with pytest.raises(OSError):  # noqa: PT011, PT012  # the server hangs up while we write
            for _ in range(40):
                connection.sendall(b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n")
            if b" 413 " not in connection.recv(200):
                raise AssertionError
            raise OSError


def test_a_body_that_trickles_in(strict_url: str) -> None:
    host, port = strict_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        started = time.monotonic()
        assert b" 408 " in connection.recv(200)
        assert time.monotonic() - started < 3


def test_a_head_that_never_ends(tiny_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    shelf = echo_shelf(EchoEngine(processor_of(tiny_chat)))
    with serving(shelf, http=protocol.PatientProtocol) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
            assert connection.recv(100) == b""
        assert post(url + CHAT, asking({"type": "text", "text": "say:x"}))[0] == 200


def test_a_million_tokens(strict_url: str) -> None:
    assert "characters" in refused(strict_url, asking({"type": "text", "text": "a b " * 1_100_000}))
    refused(strict_url, {"model": "m", "prompt": "a b " * 1_100_000}, "/v1/completions")
    refused(strict_url, {"model": "m", "prompt": [1] * 1_000_000}, "/v1/completions")


def test_texts_that_no_context_holds_are_not_even_cut_into_tokens(strict_url: str, echo: EchoEngine) -> None:
    text = " " * (echo.model.context_length * CHARACTERS_OF_A_TOKEN + 1)
    assert "characters" in refused(strict_url, asking({"type": "text", "text": text}))
    assert "characters" in refused(strict_url, {"model": "m", "prompt": text}, "/v1/completions")


def test_too_many_messages_and_parts(strict_url: str) -> None:
    message = {"role": "user", "content": "x"}
    assert "at most 10000" in refused(strict_url, {"model": "m", "messages": [message] * 10_001})
    assert "at most 10000" in refused(strict_url, asking(*[{"type": "text", "text": "x"}] * 10_001))


def test_a_schema_that_is_too_large(strict_url: str) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": [f"{i:020}" for i in range(9000)]}}}
    assert "characters" in refused(strict_url, asking({"type": "text", "text": "x"}, response_format=wanted))


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"GET /health HTTP/1.1\r\n\r\n",
        b"\x00\xff / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"GET /health HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    ],
    ids=["huge header", "no host", "no HTTP", "length below 0", "two lengths", "host in no alphabet"],
)
def test_heads_that_are_none(strict_url: str, head: bytes) -> None:
    host, port = strict_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


def test_packed_bodies_are_not_unpacked(strict_url: str) -> None:
    packed = zlib.compress(b" " * 50_000_000, 9)
    assert "JSON" in refused(strict_url, packed, **{"Content-Encoding": "deflate"})


def test_token_ids_outside_the_vocabulary(strict_url: str) -> None:
    assert "token" in refused(strict_url, {"model": "m", "prompt": [1, 2, 2**31 - 1]}, "/v1/completions")
    refused(strict_url, {"model": "m", "prompt": [-1]}, "/v1/completions")
    refused(strict_url, {"model": "m", "prompt": []}, "/v1/completions")


def test_a_text_may_not_name_more_pictures_than_a_message(tiny_chat: Path) -> None:
    """In a raw text for the original Qwen-VL, tags name them."""
    engine = EchoEngine(processor_of(reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32")))
    with serving(echo_shelf(engine), Settings(limits=STRICT)) as url:
        text = "<img>http://127.0.0.1:9/a.png</img>"
        assert "at most 3" in refused(url, {"model": "m", "prompt": text * 4}, "/v1/completions")
        assert "public internet" in refused(url, {"model": "m", "prompt": text}, "/v1/completions")
    engine = EchoEngine(processor_of(tiny_chat))  # to the others they are text
    with serving(echo_shelf(engine), Settings(limits=STRICT)) as url:
        assert post(f"{url}/v1/completions", {"model": "m", "prompt": text * 4 + "say:x"})[0] == 200


def test_too_many_pictures_frames_and_choices(strict_url: str) -> None:
    small = as_uri((DATA / "images" / "tiny_5x7.png").read_bytes())
    assert "pictures" in refused(strict_url, asking(*[image(small)] * 4))
    assert "frames" in refused(strict_url, asking({"type": "video", "video": [small] * 5}))
    refused(strict_url, asking({"type": "text", "text": "x"}, n=1000))
    refused(strict_url, asking({"type": "text", "text": "x"}, stop=["x"] * 1000))


@pytest.mark.parametrize(
    "data",
    [
        png(60_000, 60_000),
        png(2**31 - 1, 2**31 - 1),
        b"",
        b"GIF89a" + b"\xff" * 50,
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
        png(64, 64, chunk(b"zTXt", b"a\0\0" + PACKED)),
        png(64, 64, chunk(b"iCCP", b"a\0\0" + PACKED)),
        (DATA / "images" / "clip_96x64_16fps.mp4").read_bytes(),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=[
        "bomb",
        "larger bomb",
        "empty",
        "broken gif",
        "broken jpeg",
        "packed text",
        "packed profile",
        "a video",
        "svg",
        "postscript",
    ],
)
def test_pictures_that_are_none_or_bombs(strict_url: str, data: bytes) -> None:
    started = time.monotonic()
    refused(strict_url, asking(image(as_uri(data))))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x",
        "data:",
        "data:image/png;base64,%%%",
        "data:image/png,a",
        "http://",
        "http:///x.png",
        "http://[::1",
        "ftp://example.org/a.png",
        "javascript:alert(1)",
        "\0",
        "a" * 70_000,
    ],
)
def test_sources_that_are_none(strict_url: str, source: str) -> None:
    refused(strict_url, asking(image(source)))
    refused(strict_url, asking({"type": "video_url", "video_url": source}))


# -- the door -------------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for(tiny_chat: Path) -> None:
    body = asking({"type": "text", "text": "say:x"})
    with serving(echo_shelf(EchoEngine(processor_of(tiny_chat))), Settings(api_key="secret")) as url:
        assert post(url + CHAT, body)[0] == 401
        assert post(url + CHAT, body, Authorization="Bearer wrong")[0] == 401
        assert post(url + CHAT, body, Authorization="Basic secret")[0] == 401
        assert post(url + CHAT, body, Authorization="Bearer secret")[0] == 200
        for path in ("/v1/models", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url + path)
        assert urllib.request.urlopen(f"{url}/health").status == 200


def test_other_origins_and_names_stay_out(strict_url: str, tiny_chat: Path) -> None:
    body = asking({"type": "text", "text": "say:x"})
    assert "rebound.example" in refused(strict_url, body, Host="rebound.example:8000")
    assert post(strict_url + CHAT, body, Host="localhost:8000")[0] == 200
    request = urllib.request.Request(
        f"{strict_url}/v1/models", headers={"Origin": "https://elsewhere.example"}
    )
    with urllib.request.urlopen(request) as response:
        assert "access-control-allow-origin" not in {name.lower() for name in response.headers}
    ours = Settings(cors_origins=("https://ours.example",))
    with serving(echo_shelf(EchoEngine(processor_of(tiny_chat))), ours) as open_url:
        request = urllib.request.Request(f"{open_url}/v1/models", headers={"Origin": "https://ours.example"})
        with urllib.request.urlopen(request) as response:
            assert response.headers["access-control-allow-origin"] == "https://ours.example"


def test_host_headers_are_read_right() -> None:
    assert host_name("LOCALHOST:8000") == host_name("localhost") == "localhost"
    assert host_name("[::1]:8000") == "::1"
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")


def test_a_model_is_no_path(strict_url: str, tiny_chat: Path) -> None:
    """With one model any name is taken, but none is opened; see also ``Shelf.find``."""
    status, reply = post(
        strict_url + CHAT, {**asking({"type": "text", "text": "say:x"}), "model": str(tiny_chat)}
    )
    assert status == 200
    assert reply["model"] == str(tiny_chat)


def test_pages_are_told_what_they_may_do(strict_url: str) -> None:
    with urllib.request.urlopen(strict_url) as response:
        policy = response.headers["content-security-policy"]
        page = response.read().decode()
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert io.StringIO(page).readline().lower().startswith("<!doctype html>")
    with file_server(DATA) as other:
        assert other not in page
