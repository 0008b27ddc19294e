"""What requests may fetch, and how many pictures and characters they may hold."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.processor.policy import Address, FetchPolicy
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.messages import parts_of
from qwenvl_mlx.server.settings import Settings

_NAT64 = ipaddress.ip_network("64:ff9b::/96")

CHARACTERS_OF_A_TOKEN = 16
"""More than any text has on average: prose has 4 or 5, code less."""


@dataclass(frozen=True)
class ServerPolicy(FetchPolicy):
    """Files only below allowed folders; URLs only on the public internet, unless the server was told otherwise."""

    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> ServerPolicy:
        limits = settings.limits
        return cls(
            files=bool(settings.allowed_media),
            public_only=not settings.allow_private_urls,
            max_bytes=limits.fetch_bytes,
            timeout=limits.fetch_seconds,
            redirects=limits.redirects,
            max_pixels=limits.picture_pixels,
            folders=tuple(Path(folder).expanduser().resolve() for folder in settings.allowed_media),
        )

    def check_file(self, path: Path) -> None:
        """Both readings of a path that begins with ``~`` must be below an allowed folder."""
        super().check_file(path)
        for reading in {path, _expanded(path)}:
            try:
                real = reading.resolve()
            except (OSError, ValueError, RuntimeError) as error:  # no path at all, or links in a circle
                raise MediaError(f"the path of a picture or video can't be followed ({error})") from error
            if not any(real.is_relative_to(folder) for folder in self.folders):
                raise MediaError(f"{path} is not below a folder given with --allow-media-path")

    def allows_address(self, address: Address) -> bool:
        """Addresses that only wrap another one count as that one."""
        if isinstance(address, ipaddress.IPv6Address):
            if address in _NAT64:
                return self.allows_address(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
            if address.teredo is not None:
                return False
        return super().allows_address(address)


def check_counts(messages: Sequence[Mapping[str, Any]], settings: Settings, *, context: int) -> None:
    """Pictures, frames and characters of a request, counted before anything is fetched."""
    limits = settings.limits
    parts = list(parts_of(messages))
    pictures = sum(part["type"] != "text" for part in parts)
    frames = sum(len(part["video"]) for part in parts if isinstance(part.get("video"), list))
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    texts += [part["text"] for part in parts if part["type"] == "text"]
    check_pictures(pictures, settings, param="messages")
    if frames > limits.frames:
        raise ApiError(400, f"{frames} video frames: at most {limits.frames} are taken", param="messages")
    check_length(sum(map(len, texts)), settings, context=context, param="messages")


def check_pictures(count: int, settings: Settings, *, param: str) -> None:
    limit = settings.limits.pictures
    if count > limit:
        raise ApiError(400, f"{count} pictures and videos: at most {limit} are taken", param=param)


def check_length(characters: int, settings: Settings, *, context: int, param: str) -> None:
    """Texts that a model of ``context`` tokens can't hold are refused before they are cut into tokens: that is slow."""
    limit = min(settings.limits.prompt_characters, CHARACTERS_OF_A_TOKEN * context)
    if characters > limit:
        raise ApiError(
            400,
            f"the text has {characters} characters: at most {limit} are taken",
            param=param,
            code="context_length_exceeded",
        )


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # the home of nobody
        return path
