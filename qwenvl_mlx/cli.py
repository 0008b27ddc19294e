"""What all commands share: exit codes, common options, device and logging. Imports nothing heavy."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qwenvl_mlx import __version__
from qwenvl_mlx.errors import GenerationError, QwenVLError

if TYPE_CHECKING:
    from qwenvl_mlx.engine.options import EngineOptions, GenerationOptions
    from qwenvl_mlx.layers.shard import Group
    from qwenvl_mlx.processor.base import MediaOptions

RANK = "MLX_RANK"  # set by mlx.launch
DTYPES = ("float32", "bfloat16", "float16")

_CURES = {
    errno.ENOSPC: "no space left on the device: free some, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up: free some space, or write elsewhere",
    errno.EACCES: "permission denied: choose another place, or change the permissions",
    errno.EPERM: "operation not permitted: choose another place, or change the permissions",
    errno.EROFS: "the file system is read-only: write elsewhere",
}


def run(work: Callable[[], int | None]) -> int:
    """Run a command's work and turn its outcome into an exit code.

    0 done; 1 something the user can mend, told in one line on stderr; 130 interrupted. Whatever else goes
    wrong is a fault of this program and keeps its traceback.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
    except QwenVLError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone. Without this, the interpreter's last flush would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _CURES:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _fail(place + _CURES[error.errno])
    return code


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 1


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for ``python -m qwenvl_mlx.<command>`` with ``--version`` and ``--verbose``."""
    parser = argparse.ArgumentParser(prog=f"python -m qwenvl_mlx.{command}", description=description)
    parser.add_argument("--version", action="version", version=f"qwenvl-mlx {__version__}")
    parser.add_argument("--verbose", action="store_true", help="say more about what happens, on stderr")
    return parser


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """``--model --dtype --device``: what to load and where to run it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="folder, Hugging Face name, modelscope:NAME, or 'demo' for the small model that comes along",
    )
    group.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    add_device_argument(group)


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """``--device cpu|gpu``."""
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="where to run (default: gpu if there is one)"
    )


def add_media_options(parser: argparse.ArgumentParser) -> None:
    """``--min-pixels --max-pixels --fps``: how pictures and videos are cut."""
    group = parser.add_argument_group("pictures and videos")
    group.add_argument(
        "--max-pixels", type=positive, metavar="N", help="reduce pictures to at most this area"
    )
    group.add_argument(
        "--min-pixels", type=positive, metavar="N", help="enlarge pictures to at least this area"
    )
    group.add_argument("--fps", type=float, metavar="F", help="frames to take from each second of a video")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None = None) -> None:
    """Options of one generation; what is left out is as the checkpoint's ``generation_config.json`` says."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=max_tokens,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        "--temp",
        type=float,
        metavar="T",
        help="0: always the likeliest token (default: model's)",
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="choose among the likeliest tokens of this mass"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the best one")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 discourages repetition")
    group.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """``--max-kv-size --kv-bits --cache-bytes``: how much the engine may keep."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--max-kv-size",
        type=positive,
        metavar="N",
        help="tokens of prompt and answer together (default: model's)",
    )
    group.add_argument("--kv-bits", type=int, choices=(4, 8), help="quantise the KV cache")
    group.add_argument(
        "--cache-bytes",
        type=size,
        metavar="SIZE",
        help="what to keep of earlier prompts, like 2G; 0: nothing",
    )


def size(text: str) -> int:
    """An argparse type: bytes, with an optional K, M, G or T."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    value = int(float(number) * 2 ** units.get(unit, 0))
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> int:
    """An argparse type: an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def media_options(args: argparse.Namespace) -> MediaOptions:
    """What ``add_media_options`` has read."""
    from qwenvl_mlx.processor.base import MediaOptions

    return MediaOptions(min_pixels=args.min_pixels, max_pixels=args.max_pixels, fps=args.fps)


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """What ``add_sampling_options`` has read; ``GenerationError`` for a value out of range."""
    from qwenvl_mlx.engine.options import GenerationOptions

    return GenerationOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=getattr(args, "ignore_eos", False),
    )


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What ``add_engine_options`` has read."""
    from qwenvl_mlx.engine.options import EngineOptions

    return EngineOptions(max_kv_size=args.max_kv_size, kv_bits=args.kv_bits, cache_bytes=args.cache_bytes)


def use_device(name: str | None) -> None:
    """Run on this device from here on; ``GenerationError`` when a GPU is asked for and there is none."""
    if name is None:
        return
    import mlx.core as mx

    if name == "gpu" and not mx.is_available(mx.gpu):
        raise GenerationError("MLX finds no GPU on this machine: use --device cpu")
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)


def machines() -> Group | None:
    """The group that ``mlx.launch`` has started this process in; all but its first member fall silent."""
    if RANK not in os.environ:
        return None
    import mlx.core as mx

    group = mx.distributed.init()
    if group.rank():
        silence = open(os.devnull, "w")  # noqa: SIM115  # for the life of the process
        sys.stdout = sys.stderr = silence
    return group


def refuse_machines() -> None:
    """``GenerationError`` under ``mlx.launch``: each machine would do the whole work by itself."""
    if RANK in os.environ:
        raise GenerationError(
            "several machines share one answer of generate only: start this without mlx.launch"
        )


class _Once:
    """A logging filter that lets each message pass once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._told
        self._told.add(message)
        return new


def set_up_logging(args: argparse.Namespace) -> None:
    """Warnings on stderr, or everything with ``--verbose``; what holds of many modules of a checkpoint is told once."""
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("qwenvl_mlx.checkpoint").addFilter(_Once())
