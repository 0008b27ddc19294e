"""The models that this server may load, and which of them are in memory.

A request chooses among the names given on the command line; nothing in it becomes a path.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from qwenvl_mlx.engine import Engine
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.grammar import Grammars

log = logging.getLogger(__name__)

LoadEngine = Callable[[str], Engine]


@dataclass(frozen=True)
class Offer:
    """A model on the command line: its name for clients, what ``load`` is given, and the bytes it needs."""

    name: str
    source: str
    nbytes: int = 0


@dataclass
class Served:
    """A model in memory. ``users``: requests that are using it now."""

    offer: Offer
    engine: Engine
    since: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    used: float = 0.0
    grammars: Grammars = field(init=False)

    def __post_init__(self) -> None:
        self.grammars = Grammars(self.engine)

    @property
    def name(self) -> str:
        return self.offer.name


class Shelf:
    """``aliases``: further names for the only (or first) model; ``any_name``: it answers to every name."""

    def __init__(
        self,
        offers: Sequence[Offer],
        load: LoadEngine,
        *,
        aliases: Sequence[str] = (),
        any_name: bool = False,
        budget: int | None = None,
    ) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.loaded: dict[str, Served] = {}
        self.started = int(time.time())
        self._first = offers[0].name
        self._aliases = tuple(aliases)
        self._any_name = any_name
        self._load = load
        self._budget = budget
        self._loading = asyncio.Lock()

    def preload(self) -> None:
        """Load the first model, before anything is served."""
        offer = self.offers[self._first]
        self.loaded[offer.name] = Served(offer, self._load(offer.source))

    @property
    def names(self) -> list[str]:
        """What ``/v1/models`` lists."""
        rest = [name for name in self.offers if name != self._first]
        return [*(self._aliases or (self._first,)), *rest]

    def find(self, name: str) -> Offer:
        """The model that a request names; 404 for any other."""
        if name in self._aliases or (self._any_name and name not in self.offers):
            return self.offers[self._first]
        if name not in self.offers or (self._aliases and name == self._first):
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"there is no model {name!r} here; there is: {known}",
                param="model",
                code="model_not_found",
            )
        return self.offers[name]

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Served]:
        """The model, loaded if need be, and kept until the request is over."""
        served = await self.load(self.find(name))
        served.users += 1
        try:
            yield served
        finally:
            served.users -= 1
            served.used = time.monotonic()

    async def load(self, offer: Offer) -> Served:
        """The model in memory; unused ones make room for it."""
        async with self._loading:
            if offer.name not in self.loaded:
                await self._make_room(offer)
                log.info("loading %s from %s", offer.name, offer.source)
                engine = await asyncio.to_thread(self._load, offer.source)
                self.loaded[offer.name] = Served(offer, engine)
            return self.loaded[offer.name]

    async def close(self) -> None:
        """End all engines; requests under way fail."""
        for name in list(self.loaded):
            await self._drop(name)

    async def _make_room(self, offer: Offer) -> None:
        while self._budget is not None and self.loaded and self._used() + offer.nbytes > self._budget:
            idle = [served for served in self.loaded.values() if not served.users]
            if not idle:
                raise ApiError(
                    429, f"no memory for {offer.name} while other models are busy: try again later",
                    code="model_busy", headers={"Retry-After": "10"},
                )  # fmt: skip
            await self._drop(min(idle, key=lambda served: served.used).name)

    def _used(self) -> int:
        return sum(served.offer.nbytes for served in self.loaded.values())

    async def _drop(self, name: str) -> None:
        log.info("unloading %s", name)
        served = self.loaded.pop(name)
        await asyncio.to_thread(served.engine.close)
