"""Counters and times in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Mapping

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_HELP = {
    "qwenvl_requests_total": "Requests answered, by path and status.",
    "qwenvl_prompt_tokens_total": "Tokens of prompts.",
    "qwenvl_cached_tokens_total": "Tokens of prompts that the prefix cache already knew.",
    "qwenvl_completion_tokens_total": "Tokens generated.",
    "qwenvl_cancelled_total": "Generations ended because the client had left or the time was over.",
    "qwenvl_active_requests": "Generations that wait or run.",
    "qwenvl_first_token_seconds": "From the end of the request's body to the first piece of the answer.",
    "qwenvl_request_seconds": "From the end of the request's body to the end of the answer.",
    "qwenvl_model_loaded": "1 while the model is in memory.",
    "qwenvl_waiting": "Requests in the engine's queue.",
    "qwenvl_running": "Requests that the engine reads or answers.",
}


class Histogram:
    """Cumulative buckets of seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        lines, running = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            running += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {running}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {running}"]


class Metrics:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._times: dict[str, Histogram] = defaultdict(Histogram)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Raise a counter (or move a gauge by ``value``)."""
        with self._lock:
            self._values[name][_labels(labels)] += value

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            self._times[name].observe(seconds)

    def value(self, name: str, **labels: str) -> float:
        with self._lock:
            return self._values[name][_labels(labels)]

    def render(self, now: Mapping[str, Mapping[str, float]]) -> str:
        """The page; ``now``: further gauges, name -> label text -> value."""
        with self._lock:
            values = {name: dict(rows) for name, rows in self._values.items()}
            times = {name: histogram.lines(name) for name, histogram in self._times.items()}
        lines: list[str] = []
        for name, rows in {**values, **now}.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [*_head(name, kind), *(f"{name}{labels} {value:g}" for labels, value in rows.items())]
        for name, rows_of_one in times.items():
            lines += [*_head(name, "histogram"), *rows_of_one]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    help_line = [f"# HELP {name} {_HELP[name]}"] if name in _HELP else []
    return [*help_line, f"# TYPE {name} {kind}"]


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, value in labels.items()
    }
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"
