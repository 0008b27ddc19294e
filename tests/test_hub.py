"""Names to folders: against a small fake of the hub that loses connections, and without any network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from helpers import HERE

from qwenvl_mlx.errors import HubError
from qwenvl_mlx.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = json.dumps({"model_type": "qwen2_vl"}).encode()
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}" * 400,
    "model.safetensors": bytes(range(256)) * 4000,
    "pytorch_model.bin": b"the same weights again",
    "modeling_qwen.py": b"raise SystemExit('executed')",
    "onnx/model.safetensors": b"not needed",
}


class FakeHub(ThreadingHTTPServer):
    """Knows ``owner/model`` (and ``owner/gated``); every first transfer of weights ends half-way."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.drops = {"model.safetensors"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked_for(self, name: str) -> list[str | None]:
        """Ranges of the transfers of one file."""
        return [
            wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{name}")
        ]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if "/owner/gated" in path:
            self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "terms"})
        elif "owner/model" not in path:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.send_file(path.split(f"{path.split('/resolve/')[1].split('/')[0]}/", 1)[1])
        elif "/revision/" in path and not path.endswith(("/main", COMMIT)):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            self.send(200, json.dumps([self.entry(name) for name in self.server.files]).encode())
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode())

    def entry(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, name: str) -> None:
        content = self.server.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range")
        status = 200
        if wanted and self.command == "GET":
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            content, status = content[begin:], 206
        self.send(status, content, headers, drop=name in self.server.drops and self.command == "GET")
        if self.command == "GET":
            self.server.drops.discard(name)

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, drop: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(FILES)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


SCRIPT = """
import sys
from qwenvl_mlx.errors import HubError
from qwenvl_mlx.hub import resolve
try:
    print(resolve(sys.argv[1], weights=sys.argv[2] == "weights"))
except HubError as error:
    print("HubError:", error)
"""


def ask(name: str, cache: Path, *, endpoint: str, offline: bool = False, weights: bool = True) -> str:
    """``resolve`` in a process with its own cache: the client reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    line = [sys.executable, "-c", SCRIPT, name, "weights" if weights else ""]
    done = subprocess.run(
        line, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_lost_connection_is_taken_up_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    weights = hub.files["model.safetensors"] = (
        bytes(range(256)) * 100_000
    )  # the client counts in pieces of 10 MB
    folder = Path(ask("owner/model", tmp_path, endpoint=hub.url))
    assert (folder / "model.safetensors").read_bytes() == weights
    first, second = hub.asked_for("model.safetensors")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= len(weights) // 2


def test_only_the_files_that_are_needed_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    folder = Path(ask("owner/model", tmp_path, endpoint=hub.url))
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_torch_files_are_fetched_where_there_are_no_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    folder = Path(ask("owner/model", tmp_path, endpoint=hub.url))
    assert (folder / "pytorch_model.bin").exists()


def test_weights_can_be_left_out(hub: FakeHub, tmp_path: Path) -> None:
    folder = Path(ask("owner/model", tmp_path, endpoint=hub.url, weights=False))
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json"}


def test_what_is_cached_is_found_offline_and_told(hub: FakeHub, tmp_path: Path) -> None:
    folder = ask("owner/model", tmp_path, endpoint=hub.url)
    before = len(hub.requests)
    assert ask("owner/model", tmp_path, endpoint=hub.url, offline=True) == folder
    assert ask("owner/model@main", tmp_path, endpoint="http://127.0.0.1:9") == folder
    message = ask("owner/other", tmp_path, endpoint=hub.url, offline=True)
    assert "HF_HUB_OFFLINE forbids to fetch it; in the cache: owner/model" in message
    assert len(hub.requests) == before
    message = ask("owner/other", tmp_path, endpoint="http://127.0.0.1:9")
    assert "could not be fetched from http://127.0.0.1:9" in message
    assert "in the cache: owner/model" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/gated", "is gated: accept its terms"),
        ("owner/absent", "nor a repository on the hub"),
        ("owner/model@v9", "has no revision 'v9'"),
    ],
)
def test_each_refusal_has_its_own_cure(hub: FakeHub, tmp_path: Path, name: str, message: str) -> None:
    answer = ask(name, tmp_path, endpoint=hub.url)
    assert answer.startswith("HubError: ")
    assert message in answer


# ---- without a hub


def test_folders_come_first(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_name_that_is_nearly_a_folder_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "Qwen-VL-Chat-mlx").mkdir()
    with pytest.raises(HubError, match=r"neither a folder nor a name.*close to it: .*Qwen-VL-Chat-mlx"):
        resolve(tmp_path / "Qwen-VL-Chat")


def test_a_single_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(HubError, match=r"is a file: pass the folder .*not GGUF"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["", "qwen", "a/b/c", "./a/b", "/a/b", "a b/c"])
def test_what_is_no_name_is_refused_without_asking_anybody(name: str) -> None:
    with pytest.raises(HubError, match="neither a folder nor a name"):
        resolve(name)


MODELSCOPE = """
from pathlib import Path
from modelscope.hub.errors import NotExistError

def snapshot_download(repo, revision, allow_patterns, ignore_patterns, local_files_only=False):
    here = Path(__file__).parent
    if not local_files_only and (here / "away").exists():
        raise ConnectionError("no route to modelscope")
    folder = here / repo / (revision or "master")
    if repo != "qwen/Qwen-VL" or (local_files_only and not folder.exists()):
        raise NotExistError("no such model\\nwith much detail")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").touch()
    if "*.bin" in allow_patterns:
        (folder / "pytorch_model.bin").touch()
    return str(folder)
"""


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a stand-in for its client, whose errors have as little in common as the true one's."""
    package = tmp_path / "modelscope"
    (package / "hub").mkdir(parents=True)
    (package / "__init__.py").write_text(MODELSCOPE)
    (package / "hub" / "__init__.py").touch()
    (package / "hub" / "errors.py").write_text("class NotExistError(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        monkeypatch.delitem(sys.modules, name)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        del sys.modules[name]


def test_modelscope_names_go_to_its_own_client(modelscope: Path) -> None:
    assert resolve("modelscope:qwen/Qwen-VL@v1") == modelscope / "qwen" / "Qwen-VL" / "v1"
    assert resolve("modelscope:qwen/Qwen-VL", weights=False) == modelscope / "qwen" / "Qwen-VL" / "master"


def test_what_modelscope_refuses_is_told_in_one_line(modelscope: Path) -> None:
    with pytest.raises(
        HubError, match=r"qwen/absent .*\(no such model\), and is not in its cache: check"
    ) as raised:
        resolve("modelscope:qwen/absent")
    assert "\n" not in str(raised.value)


def test_what_modelscope_has_given_before_needs_no_network(modelscope: Path) -> None:
    folder = resolve("modelscope:qwen/Qwen-VL")
    (modelscope / "away").touch()
    assert resolve("modelscope:qwen/Qwen-VL") == folder
    with pytest.raises(HubError, match="no route to modelscope"):
        resolve("modelscope:qwen/Qwen-VL@v2")


def test_without_its_client_modelscope_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(HubError, match=r"pip install 'qwenvl-mlx\[modelscope\]'"):
        resolve("modelscope:qwen/Qwen-VL")
