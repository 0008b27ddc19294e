"""Load the first model, then listen until told to stop."""

from __future__ import annotations

import argparse
import contextlib
import logging
import threading
import webbrowser
from pathlib import Path

import uvicorn

from qwenvl_mlx import cli, hub
from qwenvl_mlx.api import load
from qwenvl_mlx.engine import Engine, EngineOptions
from qwenvl_mlx.engine.memory import working_set
from qwenvl_mlx.errors import GenerationError
from qwenvl_mlx.server.app import create_app
from qwenvl_mlx.server.guard import is_loopback
from qwenvl_mlx.server.listen import Server, bind
from qwenvl_mlx.server.protocol import PatientProtocol
from qwenvl_mlx.server.settings import Settings
from qwenvl_mlx.server.shelf import Offer, Shelf

log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.bin")


def serve(args: argparse.Namespace, settings: Settings) -> None:
    """Run until interrupted or terminated. Raises ``QwenVLError`` for what keeps the server from starting."""
    level = "debug" if args.verbose else args.log_level
    logging.basicConfig(level=level.upper(), format="%(levelname)s: %(message)s")
    if settings.api_key is None and not is_loopback(settings.host):
        log.warning("anybody who reaches %s can use this server: consider --api-key", settings.host)
    cli.refuse_machines()
    cli.use_device(args.device)
    sockets = bind(settings.host, settings.port)
    shelf = make_shelf(args)
    shelf.preload()
    app = create_app(shelf, settings)
    config = uvicorn.Config(app, log_level=level, server_header=False, http=PatientProtocol)
    server = Server(config, end=app.state.server.end, patience=args.shutdown_timeout)
    port = sockets[0].getsockname()[1]
    log.info("%s is ready at http://%s:%d", ", ".join(shelf.names), _in_url(settings.host), port)
    if args.inbrowser:
        threading.Timer(1, webbrowser.open, [f"http://localhost:{port}"]).start()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a server is ended
        server.run(sockets)


def make_shelf(args: argparse.Namespace) -> Shelf:
    """Folders of all models are found (and downloaded) now: no request ever does."""
    options = EngineOptions(
        prefill_chunk=args.prefill_chunk,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        cache_bytes=args.cache_bytes,
        max_kv_size=args.max_kv_size,
        kv_bits=args.kv_bits,
    )

    def load_engine(source: str) -> Engine:
        model, processor = load(source, dtype=args.dtype)
        return Engine(model, processor, options)

    offers = [_offer(text) for text in args.model]
    if len({offer.name for offer in offers}) < len(offers):
        raise GenerationError("two models have the same name: write --model NAME=FOLDER")
    aliases = args.served_model_name
    return Shelf(
        offers,
        load_engine,
        aliases=[name for name in aliases if name != "*"],
        any_name="*" in aliases or (len(offers) == 1 and not aliases),
        budget=args.memory or working_set() * 3 // 4,
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _offer(text: str) -> Offer:
    """``NAME=M`` or ``M``, whose name is then its last part."""
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        name, source = "", text
    folder = hub.resolve(source)
    weights = next((found for kind in WEIGHTS if (found := list(folder.glob(kind)))), [])
    nbytes = sum(path.stat().st_size for path in weights)
    return Offer(name or _short(source, folder), str(folder), nbytes)


def _short(source: str, folder: Path) -> str:
    return folder.resolve().name if Path(source).expanduser().is_dir() else source.rpartition("/")[2]
