"""``python -m qwenvl_mlx.server``: read the command line, then start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwenvl_mlx import cli
from qwenvl_mlx.server.settings import MIB, Limits, Settings

LEVELS = ("debug", "info", "warning", "error")


def make_parser() -> argparse.ArgumentParser:
    """All options; those of the original demo scripts are accepted beside ours."""
    parser = cli.make_parser("server", "Serve models to OpenAI clients, and a page to chat with them.")
    _add_models(parser)
    _add_network(parser)
    _add_limits(parser)
    cli.add_engine_options(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-batch", type=cli.positive, default=8, metavar="N", help="answers decoded together (8)"
    )
    group.add_argument(
        "--max-queue", type=cli.positive, default=64, metavar="N", help="requests that may wait (64)"
    )
    group.add_argument(
        "--prefill-chunk", type=cli.positive, default=768, metavar="N", help="tokens read at once (768)"
    )
    parser.add_argument("--inbrowser", action="store_true", help="open the page in the browser")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="what is told on stderr (info)")
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        "--checkpoint-path",
        "-c",
        action="append",
        metavar="[NAME=]M",
        help="folder, hub name, modelscope:NAME or 'demo'; repeatable: further ones are loaded when first asked for",
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="name of the first model for clients, repeatable; without it a single model answers to every name",
    )
    group.add_argument("--dtype", choices=cli.DTYPES, help="type of the weights (default: as stored)")
    group.add_argument("--device", choices=("cpu", "gpu"), help="where to run (default: gpu if there is one)")
    group.add_argument(
        "--cpu-only", action="store_const", const="cpu", dest="device", help="same as --device cpu"
    )
    group.add_argument(
        "--memory",
        type=cli.size,
        metavar="SIZE",
        help="for weights of all loaded models, like 48G (default: 3/4 of RAM)",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network and safety")
    group.add_argument(
        "--host", "--server-name", default="127.0.0.1", help="address to listen on (127.0.0.1)"
    )
    group.add_argument("--port", "--server-port", type=_port, default=8000, help="port to listen on (8000)")
    group.add_argument(
        "--api-key", metavar="KEY", help="clients must send it (default: $QWENVL_API_KEY, else none)"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="let pages of this origin call; repeatable",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name for this server; repeatable",
    )
    group.add_argument(
        "--allow-media-path",
        action="append",
        default=[],
        metavar="FOLDER",
        help="let requests name files below it; repeatable",
    )
    group.add_argument(
        "--allow-private-urls", action="store_true", help="let requests name URLs of this machine and network"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    group = parser.add_argument_group("limits of one request")
    numbers = (
        ("--max-body-mb", limits.body_bytes // MIB, "its body, pictures included"),
        ("--max-pictures", limits.pictures, "pictures and videos"),
        ("--max-picture-mpixels", limits.picture_pixels // 10**6, "megapixels of a picture"),
        ("--max-frames", limits.frames, "frames of a video"),
        ("--max-fetch-mb", limits.fetch_bytes // MIB, "a file that is fetched"),
        ("--max-choices", limits.choices, "answers (n)"),
    )
    for name, value, meaning in numbers:
        group.add_argument(name, type=cli.positive, default=value, metavar="N", help=f"{meaning} ({value})")
    times = (
        ("--request-timeout", limits.request_seconds, "the whole request"),
        ("--body-timeout", limits.body_seconds, "until its body has come"),
        ("--fetch-timeout", limits.fetch_seconds, "until a file is fetched"),
        ("--keep-alive", Settings().keep_alive_seconds, "silence before a comment keeps a stream alive"),
    )
    for name, seconds, meaning in times:
        group.add_argument(
            name, type=_seconds, default=seconds, metavar="S", help=f"{meaning} ({seconds:g} s)"
        )
    group.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="to finish answers when told to stop, before they are ended (30 s)",
    )


def _port(text: str) -> int:
    """An argparse type; 0 takes any free port."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 65535")
    return value


def _seconds(text: str) -> float:
    """An argparse type: a time above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time above 0")
    return value


def settings_of(args: argparse.Namespace) -> Settings:
    """What was read about everything but the engine."""
    import os

    limits = Limits(
        body_bytes=args.max_body_mb * MIB,
        body_seconds=args.body_timeout,
        pictures=args.max_pictures,
        picture_pixels=args.max_picture_mpixels * 10**6,
        frames=args.max_frames,
        fetch_bytes=args.max_fetch_mb * MIB,
        fetch_seconds=args.fetch_timeout,
        choices=args.max_choices,
        request_seconds=args.request_timeout,
    )
    return Settings(
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("QWENVL_API_KEY") or None,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=tuple(args.allowed_host),
        allowed_media=tuple(args.allow_media_path),
        allow_private_urls=args.allow_private_urls,
        keep_alive_seconds=args.keep_alive,
        limits=limits,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as for every command: 0 done, 1 with a reason on stderr, 2 wrong usage, 130 interrupted."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("no model is given: pass --model, for example --model demo")

    def work() -> None:
        from qwenvl_mlx.server.serve import serve

        serve(args, settings_of(args))

    return cli.run(work)


if __name__ == "__main__":
    sys.exit(main())
