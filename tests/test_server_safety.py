"""Hostile requests: each is answered with a 4xx in OpenAI's shape, at once, and the server lives on."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA
from serving import EchoEngine, chat_checkpoint, echo_shelf, file_server, processor_of, serving

from qwenvl_mlx.server import protocol
from qwenvl_mlx.server.guard import host_name, is_loopback
from qwenvl_mlx.server.media import ServerPolicy
from qwenvl_mlx.server.settings import Limits, Settings

LIMITS = Limits(
    body_bytes=8 << 20, body_seconds=1.0, fetch_seconds=2.0, pictures=3, frames=4, fetch_bytes=1 << 20
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "a.png").write_bytes((DATA / "images" / "rgb_97x61.png").read_bytes())
    (folder / "link.png").symlink_to(DATA / "images" / "rgba_64x90.png")
    return folder


@pytest.fixture(scope="module")
def url(checkpoint: Path, allowed: Path) -> Iterator[str]:
    """As it is started without options, but for small limits and one folder that may be read."""
    engine = EchoEngine(processor_of(checkpoint))
    with serving(echo_shelf(engine), Settings(limits=LIMITS, allowed_media=(str(allowed),))) as url:
        yield url


@pytest.fixture(scope="module")
def trusting(checkpoint: Path) -> Iterator[str]:
    """May fetch from this machine: for limits on what is fetched."""
    engine = EchoEngine(processor_of(checkpoint))
    with serving(echo_shelf(engine), Settings(limits=LIMITS, allow_private_urls=True)) as url:
        yield url


def send(
    url: str, body: Any, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refused(url: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> str:
    """The message of a 4xx; the server must still be well afterwards."""
    status, reply = send(url, body, path, **headers)
    assert 400 <= status < 500, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    with urllib.request.urlopen(f"{url}/health", timeout=10) as health:
        assert health.status == 200
    return str(reply["error"]["message"])


def asking(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": [*parts]}], **fields}


def image(source: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


def as_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    """A small file that announces a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compress(b"\0" * 100_000, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


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
def test_broken_and_deeply_nested_json(url: str, body: bytes) -> None:
    refused(url, body)


def test_schemas_nested_as_deeply_as_json_may_be(url: str) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}}
    wanted = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    text = {"type": "text", "text": "say:x"}
    status, reply = send(url, asking(text, response_format=wanted))
    assert status in (200, 400), reply
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    status, reply = send(url, asking(text, tools=[tool]))
    assert status in (200, 400), reply


def test_a_lone_surrogate_is_no_fault_of_the_server(url: str) -> None:
    status, _ = send(url, b'{"model": "m", "messages": [{"role": "user", "content": "say:\\ud800"}]}')
    assert status in (200, 400)


def test_other_content_types_are_refused(url: str) -> None:
    """A page elsewhere may post these without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert send(url, asking({"type": "text", "text": "say:x"}), **{"Content-Type": kind})[0] == 415


# -- sizes ----------------------------------------------------------------------------------------------------------


def test_bodies_that_are_too_large(url: str) -> None:
    assert "larger than" in refused(url, b" " * (LIMITS.body_bytes + 1))


def test_a_body_that_says_nothing_of_its_size(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
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


def test_a_body_that_trickles_in(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        started = time.monotonic()
        assert b" 408 " in connection.recv(200)
        assert time.monotonic() - started < 3


def test_a_head_that_never_ends(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    shelf = echo_shelf(EchoEngine(processor_of(checkpoint)))
    with serving(shelf, http=protocol.PatientProtocol) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
            assert connection.recv(100) == b""
        assert send(url, asking({"type": "text", "text": "say:x"}))[0] == 200


def test_a_million_tokens(url: str) -> None:
    assert "characters" in refused(url, asking({"type": "text", "text": "a b " * 1_100_000}))
    refused(url, {"model": "m", "prompt": "a b " * 1_100_000}, "/v1/completions")
    refused(url, {"model": "m", "prompt": [1] * 1_000_000}, "/v1/completions")


def test_token_ids_outside_the_vocabulary(url: str) -> None:
    assert "token" in refused(url, {"model": "m", "prompt": [1, 2, 2**31 - 1]}, "/v1/completions")
    refused(url, {"model": "m", "prompt": [-1]}, "/v1/completions")
    refused(url, {"model": "m", "prompt": []}, "/v1/completions")


def test_too_many_pictures_frames_and_choices(url: str) -> None:
    small = as_uri((DATA / "images" / "tiny_5x7.png").read_bytes())
    assert "pictures" in refused(url, asking(*[image(small)] * 4))
    assert "frames" in refused(url, asking({"type": "video", "video": [small] * 5}))
    refused(url, asking({"type": "text", "text": "x"}, n=1000))
    refused(url, asking({"type": "text", "text": "x"}, stop=["x"] * 1000))


@pytest.mark.parametrize(
    "data",
    [
        png(60_000, 60_000),
        png(2**31 - 1, 2**31 - 1),
        b"",
        b"GIF89a" + b"\xff" * 50,
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=["bomb", "larger bomb", "empty", "broken gif", "broken jpeg", "svg", "postscript"],
)
def test_pictures_that_are_none_or_bombs(url: str, data: bytes) -> None:
    started = time.monotonic()
    refused(url, asking(image(as_uri(data))))
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
def test_sources_that_are_none(url: str, source: str) -> None:
    refused(url, asking(image(source)))
    refused(url, asking({"type": "video_url", "video_url": source}))


# -- files ----------------------------------------------------------------------------------------------------------


def test_files_are_read_below_allowed_folders_only(url: str, allowed: Path, checkpoint: Path) -> None:
    assert send(url, asking(image(str(allowed / "a.png")), {"type": "text", "text": "say:x"}))[0] == 200
    assert send(url, asking(image(f"file://{allowed}/a.png"), {"type": "text", "text": "say:x"}))[0] == 200
    outside = [
        str(DATA / "images" / "rgb_97x61.png"),
        f"file://{DATA}/images/rgb_97x61.png",
        f"{allowed}/../{checkpoint.name}/config.json",
        f"{allowed}/link.png",
        f"file://{allowed}/%2e%2e/x.png",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "/dev/zero",
    ]
    for path in outside:
        assert "--allow-media-path" in refused(url, asking(image(path)))
        refused(url, asking({"type": "video", "video": path}))


def test_without_the_option_no_file_is_read(trusting: str, allowed: Path) -> None:
    assert "data URI" in refused(trusting, asking(image(str(allowed / "a.png"))))


def test_tildes_lead_nowhere_else(allowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(allowed)
    monkeypatch.setenv("HOME", str(DATA))
    policy = ServerPolicy.of(Settings(allowed_media=(str(allowed),)))
    with pytest.raises(Exception, match="not below"):
        policy.check_file(Path("~/images/rgb_97x61.png"))


# -- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00::1]",
        "100.64.0.1",
        "2130706433",
        "0x7f.1",
        "127.1",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "224.0.0.1",
    ],
)
def test_no_private_address_is_asked(url: str, host: str) -> None:
    refused(url, asking(image(f"http://{host}:9/x.png")))


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler], host: str = "127.0.0.1") -> Iterator[str]:
    server = ThreadingHTTPServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Redirector(BaseHTTPRequestHandler):
    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_redirects_are_checked_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public host that sends us on to this machine. Only the first address is let through, as if it were public."""
    asked = []

    class Counting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    original = ServerPolicy.allows_address
    monkeypatch.setattr(
        ServerPolicy,
        "allows_address",
        lambda self, address: str(address) == "127.0.0.2" or original(self, address),
    )
    shelf = echo_shelf(EchoEngine(processor_of(checkpoint)))
    with (
        listening(Counting) as inner,
        listening(Redirector, "127.0.0.2") as outer,
        serving(shelf, Settings(limits=LIMITS)) as url,
    ):
        for target in (f"{inner}/secret", "file:///etc/passwd", "data:image/png;base64,"):
            Redirector.target = target
            refused(url, asking(image(f"{outer}/x.png")))
        Redirector.target = f"{outer}/again"
        assert "redirect" in refused(url, asking(image(f"{outer}/x.png")))
    assert asked == []


def test_a_name_that_changes_its_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one that is used, and the name is asked once for each connection."""
    answers = iter(["93.184.216.34", *["127.0.0.1"] * 10])
    asked, connected = [], []
    resolve = socket.getaddrinfo

    def changing(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "rebind.example":
            return resolve(host, port, *args, **kwargs)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: Any, *args: Any, **kwargs: Any) -> Any:
        connected.append(address[0])
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    monkeypatch.setattr("qwenvl_mlx.processor.download.socket.create_connection", connect)
    policy = ServerPolicy.of(Settings(limits=LIMITS))
    from qwenvl_mlx.errors import MediaError
    from qwenvl_mlx.processor.fetch import load_image

    with pytest.raises(MediaError):
        load_image("http://rebind.example/a.png", policy=policy)
    assert asked == ["rebind.example"]
    assert connected == ["93.184.216.34"]
    with pytest.raises(MediaError, match="public internet"):
        load_image("http://rebind.example/a.png", policy=policy)
    assert connected == ["93.184.216.34"]


# -- what is fetched ------------------------------------------------------------------------------------------------


class Trap(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/endless":
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"\0" * (1 << 20))
            except OSError:
                return
        elif self.path == "/slow":
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"\x89")
                    time.sleep(0.2)
            except OSError:
                return
        else:
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>no picture</title>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("path", ["endless", "slow", "page"])
def test_downloads_have_limits(trusting: str, path: str) -> None:
    with listening(Trap) as trap:
        started = time.monotonic()
        refused(trusting, asking(image(f"{trap}/{path}")))
        assert time.monotonic() - started < 6


def test_a_playlist_fetches_nothing(url: str, allowed: Path) -> None:
    """FFmpeg's playlists name further files and URLs: a video must not make the server open them."""
    pytest.importorskip("av", reason="videos need the extra 'video'")
    asked = []

    class Listening(Trap):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with listening(Listening) as host:
        target, port = f"{host}/inner.ts", host.rpartition(":")[2]
        head = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
        lists = [
            f"{head}{target}\n#EXT-X-ENDLIST\n",
            f"{head}file://{allowed}/a.png\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{target}'\n",
            f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period><AdaptationSet>"
            f"<Representation id='1' mimeType='video/mp4'><BaseURL>{target}</BaseURL></Representation>"
            "</AdaptationSet></Period></MPD>",
            f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n",
        ]
        started = time.monotonic()
        for text in lists:
            refused(url, asking({"type": "video_url", "video_url": as_uri(text.encode(), "video/mp4")}))
        assert time.monotonic() - started < 3
    assert asked == []


def test_special_tokens_in_text_load_no_files(url: str) -> None:
    """The original Qwen-VL's tags name paths; here they must not read any."""
    text = {"type": "text", "text": "<img>/etc/passwd</img><|image_pad|>"}
    status, _ = send(url, asking(text))
    assert status in (200, 400)


# -- the door -------------------------------------------------------------------------------------------------------


def test_the_key_is_asked_for(checkpoint: Path) -> None:
    body = asking({"type": "text", "text": "say:x"})
    with serving(echo_shelf(EchoEngine(processor_of(checkpoint))), Settings(api_key="secret")) as url:
        assert send(url, body)[0] == 401
        assert send(url, body, Authorization="Bearer wrong")[0] == 401
        assert send(url, body, Authorization="Basic secret")[0] == 401
        assert send(url, body, Authorization="Bearer secret")[0] == 200
        for path in ("/v1/models", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url + path)
        assert urllib.request.urlopen(f"{url}/health").status == 200


def test_other_origins_and_names_stay_out(url: str, checkpoint: Path) -> None:
    body = asking({"type": "text", "text": "say:x"})
    assert "rebound.example" in refused(url, body, Host="rebound.example:8000")
    assert send(url, body, Host="localhost:8000")[0] == 200
    request = urllib.request.Request(f"{url}/v1/models", headers={"Origin": "https://elsewhere.example"})
    with urllib.request.urlopen(request) as response:
        assert "access-control-allow-origin" not in {name.lower() for name in response.headers}
    ours = Settings(cors_origins=("https://ours.example",))
    with serving(echo_shelf(EchoEngine(processor_of(checkpoint))), ours) as open_url:
        request = urllib.request.Request(f"{open_url}/v1/models", headers={"Origin": "https://ours.example"})
        with urllib.request.urlopen(request) as response:
            assert response.headers["access-control-allow-origin"] == "https://ours.example"


def test_host_headers_are_read_right() -> None:
    assert host_name("LOCALHOST:8000") == host_name("localhost") == "localhost"
    assert host_name("[::1]:8000") == "::1"
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")


def test_a_model_is_no_path(url: str, checkpoint: Path) -> None:
    """With one model any name is taken, but none is opened; see also ``Shelf.find``."""
    status, reply = send(url, {**asking({"type": "text", "text": "say:x"}), "model": str(checkpoint)})
    assert status == 200
    assert reply["model"] == str(checkpoint)


def test_pages_are_told_what_they_may_do(url: str) -> None:
    with urllib.request.urlopen(url) as response:
        policy = response.headers["content-security-policy"]
        page = response.read().decode()
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert io.StringIO(page).readline().lower().startswith("<!doctype html>")
    with file_server(DATA) as other:
        assert other not in page
