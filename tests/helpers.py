"""Where the test data lies, and what several tests need."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SHARED = HERE.parent.parent / "shared" / "reference"


def reference(path: str) -> Path:
    """A golden or tiny checkpoint: the carried copy, else the one beside the checkout; skips where there is neither."""
    for root in (DATA, SHARED):
        if (root / path).exists():
            return root / path
    pytest.skip(f"{path} is neither in tests/data nor beside the checkout")


def heed_interrupts() -> None:
    """For a child process: whoever runs the tests in the background has told it to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
