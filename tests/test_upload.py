"""``--upload-repo`` with the hub's own client, against a small fake of the hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import HERE, reference

TOKEN = "hf_known"


class Handler(BaseHTTPRequestHandler):
    """Creates repositories, takes large files by LFS and small ones in the commit, and knows one token."""

    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.send(403 if self.server.full else 200, {"error": "no storage left"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.send(409 if self.server.exists else 200, {"url": f"{self.server.url}/me/mine"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [
                {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()
            ]
            self.send(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            places = [{"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}} for item in objects]
            self.send(
                200,
                {"objects": [item | {"actions": place} for item, place in zip(objects, places, strict=True)]},
            )
        elif self.path.endswith("/commit/main"):
            self.server.commit = [json.loads(line) for line in body.splitlines()]
            self.send(200, {"commitUrl": f"{self.server.url}/me/mine/commit/1", "commitOid": "1"})
        else:
            self.send(200, {"errors": [], "warnings": []})  # the check of the card's front matter

    def send(self, status: int, value: dict[str, object]) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.exists = self.full = False
        self.large: dict[str, bytes] = {}
        self.commit: list[dict[str, dict[str, str]]] = []

    def files(self) -> dict[str, bytes]:
        """What the commit puts into the repository."""
        rows = [row["value"] for row in self.commit]
        found = {row["path"]: self.large[row["oid"]] for row in rows if "oid" in row}
        return found | {row["path"]: base64.b64decode(row["content"]) for row in rows if "content" in row}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def convert(folder: Path, endpoint: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder.parent / "cache"),
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    line = [sys.executable, "-m", "qwenvl_mlx.convert", "--hf-path", str(reference("qwen2_vl/tiny-hub"))]
    line += ["--mlx-path", str(folder), "--upload-repo", "me/mine"]
    return subprocess.run(
        line, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("exists", [False, True])
def test_the_repository_gets_every_file_of_the_folder(hub: FakeHub, tmp_path: Path, exists: bool) -> None:
    hub.exists = exists
    done = convert(tmp_path / "mlx", hub.url)
    assert done.returncode == 0, done.stderr
    assert hub.files() == {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}
    card = hub.files()["README.md"].decode()
    assert "library_name: mlx" in card
    assert "--model me/mine " in card


def test_a_refusal_says_how_to_log_in(hub: FakeHub, tmp_path: Path) -> None:
    done = convert(tmp_path / "mlx", hub.url, token="hf_unknown")
    assert done.returncode == 1
    assert "me/mine could not be uploaded" in done.stderr
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.commit


def test_weights_that_the_hub_will_not_store_are_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.full = True
    done = convert(tmp_path / "mlx", hub.url)
    assert done.returncode == 1
    assert "only the upload failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.commit


def test_without_a_network_the_folder_is_still_there(tmp_path: Path) -> None:
    done = convert(tmp_path / "mlx", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "only the upload failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "mlx" / "config.json").exists()
