"""The one door to mlx-lm's leaf modules, without the cost of its package.

``import mlx_lm.models.cache`` first runs ``mlx_lm/__init__.py``, which imports transformers: seconds, where the leaf
modules alone take milliseconds. So a stand-in package is put in place: it has the real ``__path__``, and runs the
real ``__init__`` at the first attribute that it lacks, so that ``mlx_lm.load`` keeps working for everybody else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]  # from here on an ordinary package
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _stand_in() -> None:
    if "mlx_lm" in sys.modules:
        return
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None:
        raise ImportError("mlx-lm is missing: pip install mlx-lm")
    package = _LazyPackage("mlx_lm")
    package.__spec__ = spec
    package.__file__ = spec.origin
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__package__ = "mlx_lm"
    sys.modules["mlx_lm"] = package


def leaf(name: str) -> Any:
    """Import ``mlx_lm.<name>``, for example ``leaf("models.cache")``."""
    _stand_in()
    return importlib.import_module(f"mlx_lm.{name}")
