"""The few functions that a user needs: load a model, ask it something."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from os import PathLike
from typing import Any

from qwenvl_mlx import checkpoint, hub
from qwenvl_mlx.config import read_json
from qwenvl_mlx.engine import Engine, EngineOptions, Event, GenerationOptions, Reply
from qwenvl_mlx.engine.engine import Question
from qwenvl_mlx.errors import GenerationError
from qwenvl_mlx.layers.shard import Group
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.processor.bare import BareProcessor
from qwenvl_mlx.processor.base import MediaOptions, Processor
from qwenvl_mlx.processor.load import load_processor

Path = str | PathLike[str]


def load(
    path: Path, dtype: str | None = None, *, group: Group | None = None
) -> tuple[VisionLanguageModel, Processor]:
    """A folder or hub name -> model and processor, ready to use.

    ``dtype``: "float32", "bfloat16", "float16", or None for that of the checkpoint.
    ``group``: machines that share the model (``mx.distributed``); each must then ask the same. Raises ``HubError``,
    ``CheckpointError``, ``ConfigError``.
    """
    folder = hub.resolve(path)
    processor = load_processor(folder, read_json(folder / "config.json"))
    return checkpoint.load_model(folder, dtype=dtype, group=group), processor


def load_model(path: Path, dtype: str | None = None) -> VisionLanguageModel:
    """The same without tokenizer files."""
    return checkpoint.load_model(hub.resolve(path), dtype=dtype)


def generate(
    model: VisionLanguageModel,
    processor: Processor | None,
    messages_or_prompt: Question,
    *,
    max_tokens: int | None = 256,
    temperature: float | None = 0.0,
    **options: Any,
) -> Reply:
    """Answer one prompt: messages, a plain question, or a ``Prompt``.

    Without a processor (None) only a ``Prompt`` will do, and the reply has tokens but no text.

    ``options``: the fields of ``GenerationOptions``, ``MediaOptions`` and ``EngineOptions``, and ``tools`` and
    ``template`` of the processor. For more than one question about the same pictures keep an ``Engine``: it remembers
    what it has read.
    """
    options |= {"max_tokens": max_tokens, "temperature": temperature}
    engine, arguments = _engine(model, processor, options)
    with engine:
        return engine.generate(messages_or_prompt, **arguments)


def stream(
    model: VisionLanguageModel,
    processor: Processor | None,
    messages_or_prompt: Question,
    *,
    max_tokens: int | None = 256,
    temperature: float | None = 0.0,
    **options: Any,
) -> Iterator[Event]:
    """Like ``generate``, event by event: ``TextEvent`` with each piece of text, at last ``FinishEvent``."""
    options |= {"max_tokens": max_tokens, "temperature": temperature}
    engine, arguments = _engine(model, processor, options)
    with engine:
        yield from engine.stream(messages_or_prompt, **arguments)


def _engine(
    model: VisionLanguageModel, processor: Processor | None, options: dict[str, Any]
) -> tuple[Engine, dict[str, Any]]:
    """Sort named options by whom they belong to; ``GenerationError`` for a name that nobody knows."""
    arguments: dict[str, Any] = {name: options.pop(name) for name in ("tools", "template") if name in options}
    arguments["options"] = GenerationOptions(**_fields_of(GenerationOptions, options))
    arguments["media"] = MediaOptions(**_fields_of(MediaOptions, options))
    # One answer: nothing is worth remembering.
    engine_options = EngineOptions(**{"cache_bytes": 0, **_fields_of(EngineOptions, options)})
    if options:
        raise GenerationError(f"{', '.join(options)}: not an option of generation; see GenerationOptions")
    return Engine(model, processor or BareProcessor(), engine_options), arguments


def _fields_of(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind) if field.name in options]
    return {name: options.pop(name) for name in names}
