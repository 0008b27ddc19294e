"""Take the port before anything slow is done, and stop in two steps: answers may finish, then they are ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from qwenvl_mlx.errors import GenerationError

log = logging.getLogger(__name__)

GRACE = 5
"""Seconds in which answers that were ended get to their clients."""


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of ``host``; nobody is listened to yet. Raises ``GenerationError``."""
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            opened = socket.socket(family, kind, protocol)
            bound.append(opened)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(address)
    except OSError as error:
        for opened in bound:
            opened.close()
        if error.errno == errno.EADDRINUSE:
            raise GenerationError(f"port {port} of {host} is in use: pass another --port") from error
        raise GenerationError(
            f"{host}:{port} can't be listened on ({error.strerror}): pass another --host or --port"
        ) from error
    return bound


class Server(uvicorn.Server):
    """After ``patience`` seconds, or at a second Ctrl-C, ``end`` is called; it ends what still runs."""

    def __init__(self, config: uvicorn.Config, *, end: Callable[[], None], patience: float) -> None:
        config.timeout_graceful_shutdown = int(patience) + GRACE
        super().__init__(config)
        self._end = end
        self._patience = patience
        self._hurry = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the second one hurries, the third one drops everything."""
        second = self.should_exit and not self._hurry.is_set()
        if second:
            self._hurry.set()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers, but not for ever."""
        ending = asyncio.ensure_future(self._end_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_in_time(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._patience)
        log.info("ending the answers that still run")
        self._end()
