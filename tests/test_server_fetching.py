"""What requests make the server read: files, addresses, redirects, names, downloads, playlists."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA
from serving import (
    CHAT,
    STRICT,
    EchoEngine,
    as_uri,
    asking,
    echo_shelf,
    image,
    post,
    processor_of,
    refused,
    serving,
)

from qwenvl_mlx.server.media import ServerPolicy
from qwenvl_mlx.server.settings import Settings

# -- files ----------------------------------------------------------------------------------------------------------


def test_files_are_read_below_allowed_folders_only(strict_url: str, allowed: Path, tiny_chat: Path) -> None:
    assert (
        post(strict_url + CHAT, asking(image(str(allowed / "a.png")), {"type": "text", "text": "say:x"}))[0]
        == 200
    )
    assert (
        post(strict_url + CHAT, asking(image(f"file://{allowed}/a.png"), {"type": "text", "text": "say:x"}))[
            0
        ]
        == 200
    )
    outside = [
        str(DATA / "images" / "rgb_97x61.png"),
        f"file://{DATA}/images/rgb_97x61.png",
        f"{allowed}/../{tiny_chat.name}/config.json",
        f"{allowed}/link.png",
        f"file://{allowed}/%2e%2e/x.png",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "/dev/zero",
    ]
    for path in outside:
        assert "--allow-media-path" in refused(strict_url, asking(image(path)))
        refused(strict_url, asking({"type": "video", "video": path}))


def test_without_the_option_no_file_is_read(trusting_url: str, allowed: Path) -> None:
    assert "data URI" in refused(trusting_url, asking(image(str(allowed / "a.png"))))


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
def test_no_private_address_is_asked(strict_url: str, host: str) -> None:
    refused(strict_url, asking(image(f"http://{host}:9/x.png")))


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


def test_redirects_are_checked_too(tiny_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    shelf = echo_shelf(EchoEngine(processor_of(tiny_chat)))
    with (
        listening(Counting) as inner,
        listening(Redirector, "127.0.0.2") as outer,
        serving(shelf, Settings(limits=STRICT)) as url,
    ):
        for target in (f"{inner}/secret", "file:///etc/passwd", "data:image/png;base64,"):
            Redirector.target = target
            refused(url, asking(image(f"{outer}/x.png")))
        Redirector.target = f"{outer}/again"
        assert "redirect" in refused(url, asking(image(f"{outer}/x.png")))
    assert asked == []


def test_a_name_that_changes_its_address(strict_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    policy = ServerPolicy.of(Settings(limits=STRICT))
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
def test_downloads_have_limits(trusting_url: str, path: str) -> None:
    with listening(Trap) as trap:
        started = time.monotonic()
        refused(trusting_url, asking(image(f"{trap}/{path}")))
        assert time.monotonic() - started < 6


def test_a_playlist_fetches_nothing(strict_url: str, allowed: Path) -> None:
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
            refused(
                strict_url, asking({"type": "video_url", "video_url": as_uri(text.encode(), "video/mp4")})
            )
        assert time.monotonic() - started < 3
    assert asked == []


def test_special_tokens_in_text_load_no_files(strict_url: str) -> None:
    """The original Qwen-VL's tags name paths; here they must not read any."""
    text = {"type": "text", "text": "<img>/etc/passwd</img><|image_pad|>"}
    status, _ = post(strict_url + CHAT, asking(text))
    assert status in (200, 400)
