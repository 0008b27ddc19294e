"""What the server refuses, and how it behaves when clients leave, time runs out, or it is told to stop."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import (
    IMAGES,
    EchoEngine,
    ask,
    chat,
    client_of,
    echo_shelf,
    post,
    processor_of,
    serving,
    wait_for,
)

from qwenvl_mlx.engine import Engine
from qwenvl_mlx.server.__main__ import main
from qwenvl_mlx.server.settings import Limits, Settings
from qwenvl_mlx.server.shelf import Offer, Shelf


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"store": True}, "store"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "tool", "tool_call_id": "z", "content": ""},
                ]
            },
            "messages[1]",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_not_supported_is_refused_by_name(
    server_url: str, fields: dict[str, Any], names: str
) -> None:
    body = {"model": "tiny", "messages": ask("x"), **fields}
    status, reply = post(f"{server_url}/v1/chat/completions", body)
    assert status == 400, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == names
    assert error["type"] == "invalid_request_error"


def test_unknown_models_and_paths_are_404(server_url: str, tiny_engine: Engine) -> None:
    assert post(f"{server_url}/v1/nothing", {})[0] == 404
    shelf = Shelf([Offer("a", ""), Offer("b", "")], lambda source: tiny_engine)
    with pytest.raises(Exception, match="no model 'c'"):
        shelf.find("c")
    named = Shelf([Offer("a", "")], lambda source: tiny_engine, aliases=["gpt-4o"])
    assert named.names == ["gpt-4o"]
    assert named.find("gpt-4o").name == "a"
    with pytest.raises(Exception, match="no model 'a'"):
        named.find("a")


def test_a_bad_picture_is_the_clients_fault(client: OpenAI) -> None:
    picture = {"type": "image", "image": "data:image/png;base64,AAAA"}
    with pytest.raises(openai.BadRequestError, match="not a picture"):
        chat(client, messages=[{"role": "user", "content": [picture]}])


def test_a_full_queue_is_429_with_retry_after(tiny_chat: Path) -> None:
    engine = EchoEngine(processor_of(tiny_chat), max_queue=0)
    with serving(echo_shelf(engine)) as url:
        client = client_of(url)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, "say:x")
        assert int(caught.value.response.headers["retry-after"]) > 0


def test_comments_keep_a_waiting_stream_alive(told: OpenAI, echo: EchoEngine, echo_url: str) -> None:
    echo.hold.clear()
    body = {"model": "tiny", "messages": ask("say:late"), "stream": True}
    request = urllib.request.Request(
        f"{echo_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        lines = [response.readline() for _ in range(6)]
        assert any(line.startswith(b": ") for line in lines)
        echo.hold.set()
        assert b"late" in response.read()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(echo: EchoEngine, echo_url: str, *, stream: bool) -> None:
    echo.hold.clear()
    before = len(echo.requests)
    body = json.dumps({"model": "tiny", "messages": ask("say:never"), "stream": stream}).encode()
    address = echo_url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: len(echo.requests) > before)
        assert not echo.requests[-1].cancelled
    wait_for(lambda: echo.requests[-1].cancelled)
    echo.hold.set()


def test_time_runs_out(tiny_chat: Path) -> None:
    engine = EchoEngine(processor_of(tiny_chat))
    engine.hold.clear()
    settings = Settings(limits=Limits(request_seconds=0.3))
    with serving(echo_shelf(engine), settings) as url:
        status, reply = post(f"{url}/v1/chat/completions", {"model": "m", "messages": ask("say:x")})
        assert status == 504
        assert reply["error"]["code"] == "timeout"
        time.sleep(0.1)
        assert engine.requests[-1].cancelled


def test_shutdown_lets_an_answer_finish(tiny_chat: Path) -> None:
    engine = EchoEngine(processor_of(tiny_chat), pause=0.05)
    with serving(echo_shelf(engine)) as url:
        client = client_of(url)
        stream = chat(client, "say:" + "x" * 100, stream=True, max_tokens=99)
        next(iter(stream))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert len(text) >= 90
    assert engine.closed


@contextlib.contextmanager
def command(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port, and its address once it is ready."""
    line = [sys.executable, "-m", "qwenvl_mlx.server", "--model", "demo", "--port", "0", *options]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            ready = next(line for line in process.stderr if " is ready at " in line)
            url = ready.rpartition(" ")[2].strip()
            wait_for(lambda: reachable(url), 20)
            yield process, url
        finally:
            process.kill()


def reachable(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    except urllib.error.URLError:
        return False


@pytest.mark.parametrize(
    ("signals", "patience", "code"),
    [([signal.SIGTERM], 0.3, -signal.SIGTERM), ([signal.SIGINT, signal.SIGINT], 60, 0)],
    ids=["SIGTERM and too long an answer", "Ctrl-C twice"],
)
def test_stopping_ends_answers_with_a_word(signals: list[signal.Signals], patience: float, code: int) -> None:
    """No stream breaks off, and no traceback is written."""
    with command("--shutdown-timeout", str(patience)) as (process, url):
        stream = chat(client_of(url), stream=True, max_tokens=4000)
        next(iter(stream))
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        with pytest.raises(openai.APIError, match="being stopped"):
            list(stream)
        assert process.wait(20) == code
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "/no/such/model", "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 is in use: pass another --port" in capsys.readouterr().err
    assert main(["--model", "demo", "--host", "203.0.113.7"]) == 1
    assert "pass another --host" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--port", "70000"], ["--port", "-1"], ["--keep-alive", "nan"]])
def test_options_out_of_range_are_wrong_usage(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "demo", *options])
    assert ended.value.code == 2


def test_the_python_example_of_the_readme_runs(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "server" / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "photo.jpg").write_bytes((IMAGES / "photo_333x217.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    code = code.replace("http://localhost:8000", server_url).replace(
        "stream=True", "stream=True, max_tokens=5"
    )
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_heap_is_tidied_now_and_then(tiny_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    monkeypatch.setattr("qwenvl_mlx.server.app.SECONDS_BETWEEN_TIDYING", 0.05)
    monkeypatch.setattr("qwenvl_mlx.server.app.give_back", lambda: times.append(time.monotonic()))
    with serving(echo_shelf(EchoEngine(processor_of(tiny_chat)))):
        wait_for(lambda: len(times) >= 3)
    ended = len(times)
    time.sleep(0.2)
    assert len(times) == ended


def test_metrics_count(told: OpenAI, echo_url: str) -> None:
    chat(told, "say:hello", max_tokens=99)
    text = urllib.request.urlopen(f"{echo_url}/metrics").read().decode()
    assert 'qwenvl_requests_total{path="chat",status="200"}' in text
    assert "qwenvl_first_token_seconds_bucket" in text
    assert "qwenvl_active_requests 0" in text
    assert 'qwenvl_model_loaded{model="tiny"} 1' in text
