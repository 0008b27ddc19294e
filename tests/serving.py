"""What the server's tests share: a server in a thread, a checkpoint that can chat, an engine that echoes."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn
from helpers import DATA, reference
from openai import OpenAI

from qwenvl_mlx.config import read_json
from qwenvl_mlx.engine import Engine, FinishEvent, GenerationOptions, Reply, TextEvent, Timings, Usage
from qwenvl_mlx.engine.request import Listener, Request
from qwenvl_mlx.engine.stops import StopStrings
from qwenvl_mlx.errors import Busy, PromptError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import Processor
from qwenvl_mlx.processor.load import load_processor
from qwenvl_mlx.server.app import create_app
from qwenvl_mlx.server.settings import Limits, Settings
from qwenvl_mlx.server.shelf import Offer, Shelf

IMAGES = DATA / "images"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'

TEMPLATE = """\
{%- if tools %}<|im_start|>system
Functions: {{ tools | tojson }}. Call one with <tool_call> and JSON.<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}
{%- endfor %}{% endif -%}
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


def chat_checkpoint(folder: Path) -> Path:
    """A tiny Qwen2-VL with a template that knows tools and thinking."""
    shutil.copytree(reference("qwen2_vl/tiny-hub"), folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def processor_of(folder: Path) -> Processor:
    return load_processor(folder, read_json(folder / "config.json"))


class EchoModel:
    vocab_size = 512
    context_length = 4096


class EchoEngine:
    """Says what stands after ``say:`` in the last message, ``step`` characters at a time with ``pause`` between them.

    ``hold``: an event that must be set before anything is said.
    """

    def __init__(
        self, processor: Processor, *, pause: float = 0.0, step: int = 5, max_queue: int = 64
    ) -> None:
        self.processor = processor
        self.model = EchoModel()
        self.pause, self.step, self.max_queue = pause, step, max_queue
        self.hold = threading.Event()
        self.hold.set()
        self.requests: list[Request] = []
        self.active = 0
        self.closed = False

    alive = True
    waiting = running = 0

    def submit(self, prompt: Prompt, options: GenerationOptions, *, listener: Listener) -> Request:
        if self.active >= self.max_queue:
            raise Busy("1 request is waiting: try again later")
        if len(prompt) >= self.model.context_length:
            raise PromptError(f"the prompt has {len(prompt)} tokens")
        request = Request(prompt, options, listener)
        self.requests.append(request)
        self.active += 1
        threading.Thread(target=self._run, args=(request,), daemon=True).start()
        return request

    def close(self) -> None:
        self.closed = True

    def _run(self, request: Request) -> None:
        while not self.hold.wait(0.01):
            if request.cancelled:
                break
        text = self.processor.tokenizer.decode(request.prompt.input_ids, skip_special=False)
        told = text.rpartition("say:")[2].partition("<|im_end|>")[0]
        stops, said, tokens = StopStrings(request.options.stop), "", 0
        limit = request.options.max_tokens or 10_000
        for start in range(0, len(told), self.step):
            if request.cancelled or tokens >= limit or stops.found:
                break
            time.sleep(self.pause)
            piece = stops.add(told[start : start + self.step])
            said, tokens = said + piece, tokens + 1
            request.emit(TextEvent(piece, [1]))
        rest = "" if stops.found else stops.finish()
        if rest:
            request.emit(TextEvent(rest, []))
        said += rest
        reason = "cancelled" if request.cancelled else "length" if tokens >= limit else "stop"
        reply = Reply(
            text=said,
            tokens=[1] * tokens,
            finish_reason=reason,
            usage=Usage(len(request.prompt), tokens, 3),
            timings=Timings(ttft=0.1, decode=1.0, tokens_per_second=tokens),
            boxes=self.processor.boxes(said, request.prompt),
            prompt_token_ids=request.prompt.input_ids,
        )
        self.active -= 1
        request.emit(FinishEvent(reply))


class Kept:
    """An engine that outlives its server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        pass


def echo_shelf(engine: Any, *, name: str = "tiny") -> Shelf:
    shelf = Shelf([Offer(name, "unused")], lambda source: engine, any_name=True)
    shelf.preload()
    return shelf


@contextlib.contextmanager
def serving(shelf: Shelf, settings: Settings | None = None, **options: Any) -> Iterator[str]:
    """A real uvicorn on a free port; yields its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(shelf, settings), log_level="warning", timeout_graceful_shutdown=5, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serves a folder's files over HTTP."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: OpenAI, text: str = "Hello", *, ignore_eos: bool = True, **fields: Any) -> Any:
    """Greedy and 12 tokens long, unless the fields say otherwise."""
    values = {"model": "tiny", "messages": ask(text), "max_tokens": 12, "temperature": 0, **fields}
    values["extra_body"] = {"ignore_eos": ignore_eos, **fields.get("extra_body", {})}
    return client.chat.completions.create(**values)


def data_uri(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it did not happen in time"
        time.sleep(0.01)


def post(url: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


STRICT = Limits(
    body_bytes=8 << 20, body_seconds=1.0, fetch_seconds=2.0, pictures=3, frames=4, fetch_bytes=1 << 20
)
CHAT = "/v1/chat/completions"


def refused(url: str, body: Any, path: str = CHAT, **headers: str) -> str:
    """The message of a 4xx; the server must still be well afterwards."""
    status, reply = post(url + path, body, **headers)
    assert 400 <= status < 500, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    with urllib.request.urlopen(f"{url}/health", timeout=10) as health:
        assert health.status == 200
    return str(reply["error"]["message"])


def asking(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A request with one message of these parts."""
    return {"model": "m", "messages": [{"role": "user", "content": [*parts]}], **fields}


def image(source: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


def as_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()
