"""Turn any checkpoint into an MLX folder, quantised or not, one tensor at a time.

Follow one through: ``options`` what is wanted, ``recipe`` which module gets how many bits, ``transform`` tensors from
the source's form to the folder's, ``folder`` an output that appears whole or not at all, ``card`` and ``quality``
what is told about the result, ``run`` all of these in order.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenvl_mlx.convert.__main__ import main
    from qwenvl_mlx.convert.run import convert

__all__ = ["convert", "main"]

_HOMES = {"convert": "run", "main": "__main__"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
