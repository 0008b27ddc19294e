"""Qwen vision-language models on Apple Silicon, through MLX.

    from qwenvl_mlx import generate, load

    model, processor = load("path-or-hub-name")
    reply = generate(model, processor, [{"role": "user", "content": [
        {"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is this?"}]}])
    print(reply.text)

Names are imported when they are first used, so that ``--help`` needs no MLX.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenvl_mlx.api import generate, load, load_model, stream
    from qwenvl_mlx.engine import Engine
    from qwenvl_mlx.media import Media, Prompt

__version__ = "0.1.0"
__all__ = ["Engine", "Media", "Prompt", "__version__", "generate", "load", "load_model", "stream"]

_HOMES = {
    "Engine": "engine",
    "Media": "media",
    "Prompt": "media",
    "generate": "api",
    "load": "api",
    "load_model": "api",
    "stream": "api",
}


class _Package(ModuleType):
    """Keeps ``qwenvl_mlx.generate`` the function, although a submodule (the command) has the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
