"""A fast BLAS before MLX is imported, and where the test data lies."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
from helpers import DATA, SHARED
from server_fixtures import *  # noqa: F403

BLIS = Path("/usr/lib/x86_64-linux-gnu/blis-pthread/libblis.so.4")

# The mlx-cpu wheel links the reference BLAS: matrix products are 20-40 times slower than with this one. Loaded after
# mlx it would have no effect.
if BLIS.exists() and "mlx.core" not in sys.modules:
    os.environ.setdefault("BLIS_NUM_THREADS", "1")
    ctypes.CDLL(str(BLIS), mode=ctypes.RTLD_GLOBAL)

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
