"""Many questions from a file, or one about each picture of a folder: batched, and resumable after a kill.

Input, a JSON object per line: ``prompt`` or ``messages``, with ``image``, ``video`` (a source or a list of them),
``system`` and any field of ``GenerationOptions``. Output, as answers finish: ``line`` and ``key`` (which line of
which content), ``text``, ``tokens``, ``finish_reason``, ``boxes`` …, or ``error``. A line that failed is tried again
by the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import queue
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_mlx.errors import OutputError, PromptError, QwenVLError

if TYPE_CHECKING:
    from qwenvl_mlx.engine import Engine, GenerationOptions
    from qwenvl_mlx.processor.base import MediaOptions

Record = dict[str, Any]
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Task:
    """One line of the input; ``key`` changes with its text."""

    line: int
    text: str

    @property
    def key(self) -> str:
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    @property
    def name(self) -> tuple[int, str]:
        return self.line, self.key

    def read(self) -> Record:
        """``PromptError`` where the line is no JSON object."""
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"line {self.line} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise PromptError(f"line {self.line} is not a JSON object")
        return value


def read_tasks(source: Path) -> list[Task]:
    """The lines of a JSONL file, or a task for each picture in a folder. Lines count from 1, empty ones too."""
    if source.is_dir():
        pictures = sorted(path for path in source.iterdir() if path.suffix.lower() in PICTURES)
        lines = [json.dumps({"image": str(path)}, ensure_ascii=False) for path in pictures]
    else:
        try:
            lines = source.read_text(encoding="utf-8").split("\n")  # JSON may hold the other line separators
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"{source} can't be read ({error}): check --batch") from error
    return [Task(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def keep_finished(output: Path, tasks: list[Task]) -> set[tuple[int, str]]:
    """What an earlier run has answered. Half lines, errors and answers to other input are dropped from the file."""
    if not output.exists():
        if not output.absolute().parent.is_dir():
            raise OutputError(f"{output.parent} is not a folder: make it, or give another --output")
        return set()
    wanted = {task.name for task in tasks}
    kept: dict[tuple[int, str], str] = {}
    for line in output.read_text(encoding="utf-8", errors="replace").split("\n"):
        name = _finished(line)
        if name in wanted:
            kept[name] = line + "\n"
    part = output.with_name(output.name + ".part")
    part.write_text("".join(kept.values()), encoding="utf-8")
    part.replace(output)
    return set(kept)


def _finished(line: str) -> tuple[int, str]:
    try:
        record = json.loads(line)
        return (record["line"], record["key"]) if "text" in record else (0, "")
    except (ValueError, KeyError, TypeError):
        return 0, ""


class Bulk:
    """Runs tasks through an engine. ``defaults``: for fields that a line leaves out."""

    def __init__(
        self, engine: Engine, options: GenerationOptions, media: MediaOptions, defaults: Mapping[str, Any]
    ) -> None:
        self._engine = engine
        self._options = options
        self._media = media
        self._defaults = defaults
        self._outcomes: queue.SimpleQueue[tuple[Task, Any]] = queue.SimpleQueue()

    def run(self, tasks: list[Task]) -> Iterator[Record]:
        """A record for each task, in the order in which they end. Pictures are read while others are answered."""
        running, limits = 0, self._engine.options
        for task in tasks:
            while running >= min(2 * limits.max_batch, limits.max_queue):
                yield self._next()
                running -= 1
            try:
                self._submit(task)
                running += 1
            except QwenVLError as error:
                yield _record(task, error)
        for _ in range(running):
            yield self._next()

    def _submit(self, task: Task) -> None:
        fields = {**self._defaults, **task.read()}
        fields.pop("id", None)
        messages = _messages(fields, task)
        options = _options(self._options, fields, task)
        listener = partial(self._listen, task)
        self._engine.submit(messages, options, media=self._media, listener=listener)

    def _listen(self, task: Task, outcome: Any) -> None:
        from qwenvl_mlx.engine import TextEvent

        if not isinstance(outcome, TextEvent):
            self._outcomes.put((task, outcome))

    def _next(self) -> Record:
        task, outcome = self._outcomes.get()
        return _record(task, outcome)


def _record(task: Task, outcome: Any) -> Record:
    """``outcome``: a FinishEvent, or the error that ended the request."""
    from qwenvl_mlx.engine import FinishEvent

    head: Record = {"line": task.line, "key": task.key}
    with contextlib.suppress(PromptError):  # told below, as the outcome
        head |= {name: value for name, value in task.read().items() if name in ("id", "image", "video")}
    if not isinstance(outcome, FinishEvent):
        return {**head, "error": str(outcome)}
    reply = outcome.reply
    return {
        **head,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "boxes": [dataclasses.asdict(box) for box in reply.boxes],
        "tokens": reply.tokens,
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.cached_tokens,
    }


def _messages(fields: Record, task: Task) -> list[Record]:
    """Take what makes the prompt out of a line's fields."""
    media = [
        {"type": kind, kind: source}
        for kind in ("image", "video")
        for source in _as_list(fields.pop(kind, []))
    ]
    system, text, messages = (fields.pop(name, None) for name in ("system", "prompt", "messages"))
    if messages is not None:
        if media or not isinstance(messages, list):
            raise PromptError(f"line {task.line}: messages must be a list, and hold the pictures")
        return messages
    if text is None:
        raise PromptError(f"line {task.line} has neither prompt nor messages: add one, or give --prompt")
    user = {"role": "user", "content": [*media, {"type": "text", "text": text}]}
    return [{"role": "system", "content": system}, user] if system else [user]


def _options(usual: GenerationOptions, fields: Record, task: Task) -> GenerationOptions:
    names = {field.name for field in dataclasses.fields(usual)} - {"constraint", "logprobs"}
    unknown = fields.keys() - names
    if unknown:
        raise PromptError(f"line {task.line}: {', '.join(sorted(unknown))} is not known")
    try:
        return dataclasses.replace(usual, **fields)
    except TypeError as error:
        raise PromptError(f"line {task.line}: an option has the wrong type ({error})") from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
