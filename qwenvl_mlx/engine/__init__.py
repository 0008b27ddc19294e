"""The one generation path: prefix cache, batch, sampling, events."""

from __future__ import annotations

from qwenvl_mlx.engine.engine import Engine
from qwenvl_mlx.engine.events import Event, FinishEvent, Reply, TextEvent, Timings, TokenLogprob, Usage
from qwenvl_mlx.engine.options import EngineOptions, GenerationOptions
from qwenvl_mlx.engine.request import Request

__all__ = [
    "Engine",
    "EngineOptions",
    "Event",
    "FinishEvent",
    "GenerationOptions",
    "Reply",
    "Request",
    "TextEvent",
    "Timings",
    "TokenLogprob",
    "Usage",
]
