"""Fixtures of the server's tests. Imports wait until one is used: other tests start without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from openai import OpenAI
    from serving import EchoEngine

    from qwenvl_mlx.engine import Engine

__all__ = [
    "allowed",
    "client",
    "echo",
    "echo_url",
    "server_url",
    "strict_url",
    "tiny_chat",
    "tiny_engine",
    "told",
    "trusting_url",
]


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-VL that can chat."""
    from serving import chat_checkpoint

    return chat_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_chat: Path) -> Iterator[Engine]:
    from qwenvl_mlx.api import load
    from qwenvl_mlx.engine import Engine, EngineOptions

    model, processor = load(tiny_chat, dtype="float32")
    with Engine(model, processor, EngineOptions(prefill_chunk=64)) as engine:
        yield engine


@pytest.fixture(scope="module")
def server_url(tiny_engine: Engine) -> Iterator[str]:
    """A server over the real engine."""
    from serving import Kept, serving

    from qwenvl_mlx.server.settings import Settings
    from qwenvl_mlx.server.shelf import Offer, Shelf

    shelf = Shelf([Offer("tiny", "unused")], lambda source: Kept(tiny_engine), any_name=True)
    shelf.preload()
    with serving(shelf, Settings(allow_private_urls=True)) as url:
        yield url


@pytest.fixture(scope="module")
def client(server_url: str) -> OpenAI:
    """A client of the real engine."""
    from serving import client_of

    return client_of(server_url)


@pytest.fixture(scope="module")
def echo(tiny_chat: Path) -> EchoEngine:
    """An engine that says what it is told."""
    from serving import EchoEngine, processor_of

    return EchoEngine(processor_of(tiny_chat))


@pytest.fixture(scope="module")
def echo_url(echo: EchoEngine) -> Iterator[str]:
    from serving import echo_shelf, serving

    from qwenvl_mlx.server.settings import Settings

    with serving(echo_shelf(echo), Settings(keep_alive_seconds=0.2, allow_private_urls=True)) as url:
        yield url


@pytest.fixture(scope="module")
def told(echo_url: str) -> OpenAI:
    """A client of the engine that says what it is told."""
    from serving import client_of

    return client_of(echo_url)


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that requests may read from; a link in it leads out."""
    from serving import IMAGES

    folder = tmp_path_factory.mktemp("allowed")
    (folder / "a.png").write_bytes((IMAGES / "rgb_97x61.png").read_bytes())
    (folder / "link.png").symlink_to(IMAGES / "rgba_64x90.png")
    return folder


@pytest.fixture(scope="module")
def strict_url(echo: EchoEngine, allowed: Path) -> Iterator[str]:
    """A server as it is started without options, but for small limits and one folder that may be read."""
    from serving import STRICT, echo_shelf, serving

    from qwenvl_mlx.server.settings import Settings

    with serving(echo_shelf(echo), Settings(limits=STRICT, allowed_media=(str(allowed),))) as url:
        yield url


@pytest.fixture(scope="module")
def trusting_url(echo: EchoEngine) -> Iterator[str]:
    """The same, but it may fetch from this machine: for limits on what is fetched."""
    from serving import STRICT, echo_shelf, serving

    from qwenvl_mlx.server.settings import Settings

    with serving(echo_shelf(echo), Settings(limits=STRICT, allow_private_urls=True)) as url:
        yield url
