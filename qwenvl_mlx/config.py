"""Frozen dataclasses read from a checkpoint's ``config.json``.

A missing key without a default is an error that names it. Keys that no class mentions are left alone: hub files
carry many that change nothing. A *value* that would change the numbers and isn't known is an error, raised by the
class that owns it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_mlx.errors import CheckpointError, ConfigError

T = TypeVar("T")
KINDS = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}  # annotations that are checked


def from_dict(cls: type[T], raw: Mapping[str, Any], *, where: str = "config.json") -> T:
    """Build the dataclass ``cls`` from the keys of ``raw`` that it names; null is as good as absent.

    Raises ``ConfigError`` for a key that is missing or of another type than its field; ``where`` goes into the message.
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    values = {field.name: _frozen(raw[field.name]) for field in fields if raw.get(field.name) is not None}
    missing = [
        field.name
        for field in fields
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: is this the folder of a whole checkpoint?")
    for field in fields:
        if field.name in values:
            _check_type(field, values[field.name], where)
    return cls(**values)


def _check_type(field: dataclasses.Field[Any], value: Any, where: str) -> None:
    names = [name.strip() for name in str(field.type).split("|")]
    kinds = {kind for name in names for kind in KINDS.get(name, ())}
    if kinds and type(value) not in kinds:
        raise ConfigError(f"{where}: {field.name} = {value!r} must be {' or '.join(names)}")


def one_of(value: Any, known: Iterable[Any], *, key: str, where: str = "config.json") -> None:
    """Raise ``ConfigError`` when ``value`` is none of ``known``."""
    known = list(known)
    if value not in known:
        names = ", ".join(repr(item) for item in known)
        raise ConfigError(f"{where}: {key} = {value!r} is not known; known: {names}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; ``CheckpointError`` names the file that is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {path.parent} a model folder?") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: fetch it again")
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
