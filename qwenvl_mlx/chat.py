"""``python -m qwenvl_mlx.chat``: talk with a model about pictures, in the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from os.path import isfile  # false, not an error, for what can't be a path
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from qwenvl_mlx import cli
from qwenvl_mlx.errors import QwenVLError

if TYPE_CHECKING:
    from qwenvl_mlx.engine import Engine, GenerationOptions, Reply
    from qwenvl_mlx.processor.base import MediaOptions

Part = dict[str, Any]

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}

HELP = """\
Type a question. A picture or video goes with it when its path stands in the line: typed, pasted, or dropped here.
  /image PATH or URL   add a picture to the next question      /video PATH or URL   the same for a video
  /regenerate          answer the last question anew            /reset               forget the conversation
  /system TEXT         instructions; starts anew                /help   /exit        or Ctrl-D
Ctrl-C stops an answer."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("chat", "Talk with a model about pictures and videos.")
    cli.add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    cli.add_media_options(parser)
    cli.add_sampling_options(parser, max_tokens=4096)
    cli.add_engine_options(parser)
    args = parser.parse_args(argv)
    cli.set_up_logging(args)
    return cli.run(lambda: _work(args))


def _work(args: argparse.Namespace) -> None:
    options = cli.generation_options(args)
    cli.refuse_machines()
    cli.use_device(args.device)
    from qwenvl_mlx.api import load
    from qwenvl_mlx.engine import Engine

    model, processor = load(args.model, dtype=args.dtype)
    with Engine(model, processor, cli.engine_options(args)) as engine:
        Chat(engine, options, cli.media_options(args), system=args.system).run(_reader())


def _reader() -> Callable[[], str]:
    """Asks for a line: with editing and history on a terminal, silently from a pipe."""
    if not sys.stdin.isatty():
        return input
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")
    print(HELP)
    return lambda: input("\n> ")


class Chat:
    """A conversation: its messages, and what waits to go with the next question."""

    def __init__(
        self,
        engine: Engine,
        options: GenerationOptions,
        media: MediaOptions,
        *,
        system: str | None = None,
    ) -> None:
        self.messages: list[Part] = []
        self._engine = engine
        self._options = options
        self._media_options = media
        self._system = system
        self._attached: list[Part] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "image": lambda source: self._attach("image", source),
            "video": lambda source: self._attach("video", source),
            "regenerate": self._regenerate,
            "reset": self._reset,
            "system": self._instruct,
            "help": lambda _: print(HELP),
        }

    def run(self, read: Callable[[], str]) -> None:
        """Until the end of the input, or ``/exit``."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line in ("/exit", "/quit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line: a command, pictures, a question, or a question with pictures."""
        command, _, rest = line[1:].partition(" ")
        if line.startswith("/") and command in self._commands:
            self._commands[command](rest.strip())
            return
        media, text = split_media(line)
        if line.startswith("/") and not media:
            is_path = "/" in command or Path(command).suffix.lower() in PICTURES | VIDEOS
            print(f"/{command} is not a file" if is_path else f"no command /{command}: /help lists them")
            return
        self._attached += media
        if text:
            self._ask(text)
        else:
            self._say_attached()

    def _ask(self, text: str) -> None:
        content = [*self._attached, {"type": "text", "text": text}] if self._attached else text
        self.messages.append({"role": "user", "content": content})
        if not self._answer():
            self.messages.pop()
            if self._attached:  # one that can't be read would spoil every further question
                print("(the picture or video is left out: give it again with the next question)")
        self._attached = []

    def _answer(self) -> bool:
        """Stream an answer and keep it; False when there is none."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        try:
            reply = self._stream([*system, *self.messages])
        except QwenVLError as error:
            print(f"error: {error}", file=sys.stderr)
            return False
        self.messages.append({"role": "assistant", "content": reply.text})
        return True

    def _stream(self, messages: list[Part]) -> Reply:
        from qwenvl_mlx.engine import TextEvent

        request = self._engine.submit(messages, self._options, media=self._media_options)
        events = iter(request)
        while True:
            try:
                for event in events:
                    if isinstance(event, TextEvent):
                        print(event.text, end="", flush=True)
                print()
                return request.result()
            except KeyboardInterrupt:
                request.cancel()
                events = iter(
                    request
                )  # the interrupted iterator has ended; the request goes on to its finish

    def _regenerate(self, _: str) -> None:
        if len(self.messages) < 2:
            print("nothing to answer anew yet")
            return
        before = self.messages.pop()
        if not self._answer():
            self.messages.append(before)

    def _reset(self, _: str) -> None:
        self.messages, self._attached = [], []
        print("(a new conversation)")

    def _instruct(self, text: str) -> None:
        self._system = text or None
        self._reset("")

    def _attach(self, kind: str, source: str) -> None:
        if not source:
            print(f"/{kind} PATH or URL")
            return
        path = clean_path(source)
        if "://" not in path and not path.startswith("data:") and not isfile(path):
            print(f"{path} is not a file")
            return
        self._attached.append({"type": kind, kind: path})
        self._say_attached()

    def _say_attached(self) -> None:
        names = ", ".join(str(part[part["type"]])[-60:] for part in self._attached)
        print(f"(with the next question: {names})")


# A quoted text, or a word in which a backslash protects the character after it, as terminals paste dropped files.
# An apostrophe within single quotes comes as '\''.
WORD = re.compile(r"""'[^']*'(?:\\''[^']*')*|"[^"]*"|(?:\\.|[^\s\\])+""")


def split_media(line: str) -> tuple[list[Part], str]:
    """Take the paths of existing pictures and videos out of a line; the rest is the text."""
    if part := _media_part(line):
        return [part], ""
    media: list[Part] = []

    def take(match: re.Match[str]) -> str:
        part = _media_part(match.group())
        if part is None:
            return match.group()
        media.append(part)
        return ""

    text = WORD.sub(take, line)
    return media, " ".join(text.split()) if media else line


def clean_path(text: str) -> str:
    """A path as pasted -> as it is: without quotes, backslashes, ``file://`` and ``%20``; ``~`` expanded."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].replace("'\\''", "'")
    elif not isfile(text):
        text = re.sub(r"\\(.)", r"\1", text)
    if text.startswith("file://"):
        return unquote(text.removeprefix("file://").removeprefix("localhost"))
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _media_part(text: str) -> Part | None:
    path = clean_path(text)
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES | VIDEOS or not isfile(path):
        return None
    kind = "image" if suffix in PICTURES else "video"
    return {"type": kind, kind: path}


if __name__ == "__main__":
    sys.exit(main())
