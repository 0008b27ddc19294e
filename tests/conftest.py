"""A fast BLAS before MLX is imported, and where the test data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import DATA, SHARED
from server_fixtures import *  # noqa: F403

from benchmarks import blas

blas.load()
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data() -> Path:
    """Goldens and tiny checkpoints that the repository carries."""
    return DATA


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference material that may not be committed (real vocabularies); skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(
            "needs the reference folder beside the checkout: real vocabularies are not part of the repository"
        )
    return SHARED
