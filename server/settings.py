"""What the server was told on its command line. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one request may cost. Sizes in bytes, times in seconds."""

    body_bytes: int = 64 * MIB
    body_seconds: float = 60.0
    pictures: int = 64
    picture_pixels: int = 90_000_000
    frames: int = 768
    fetch_bytes: int = 64 * MIB
    fetch_seconds: float = 20.0
    redirects: int = 3
    choices: int = 16
    stops: int = 16
    prompt_characters: int = 4_000_000
    request_seconds: float = 600.0
    preparing: int = 4
    """Requests whose pictures are fetched and cut at the same time."""


@dataclass(frozen=True)
class Settings:
    """Everything that is not the engine's.

    ``allowed_media``: folders below which ``file:`` paths may be read. ``allowed_hosts``: further names that the
    ``Host`` header may carry while the server listens on loopback only.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_media: tuple[str, ...] = ()
    allow_private_urls: bool = False
    keep_alive_seconds: float = 10.0
    limits: Limits = field(default_factory=Limits)
