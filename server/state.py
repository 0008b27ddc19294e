"""What all requests share: settings, models, counters, and the threads that prepare prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio
from anyio.to_thread import run_sync

from qwenvl_mlx.processor.policy import FetchPolicy
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.media import ServerPolicy
from qwenvl_mlx.server.metrics import Metrics
from qwenvl_mlx.server.run import Run
from qwenvl_mlx.server.settings import Settings
from qwenvl_mlx.server.shelf import Shelf

P = ParamSpec("P")
T = TypeVar("T")


class State:
    """Made once for each application."""

    def __init__(self, shelf: Shelf, settings: Settings) -> None:
        self.shelf = shelf
        self.settings = settings
        self.metrics = Metrics()
        self.policy: FetchPolicy = ServerPolicy.of(settings)
        self._runs: set[Run] = set()
        self._ending = False
        self._threads = anyio.CapacityLimiter(settings.limits.preparing)

    def begin(self, run: Run) -> None:
        """A run that is to be ended when the server stops; ``forget`` it afterwards."""
        self._runs.add(run)
        if self._ending:
            run.fail(_stopping())

    def forget(self, run: Run) -> None:
        self._runs.discard(run)

    def end(self) -> None:
        """The server stops: end all runs, and those to come."""
        self._ending = True
        for run in self._runs:
            run.fail(_stopping())

    async def in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run slow work beside the event loop; a client that leaves does not wait for its end."""

        def call() -> T:
            return work(*args, **kwargs)

        return await run_sync(call, abandon_on_cancel=True, limiter=self._threads)


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped", code="stopping")
