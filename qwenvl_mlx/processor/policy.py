"""What media may be fetched from where, and how much of it. The server's policy is stricter than a shell's."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from qwenvl_mlx.errors import MediaError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class FetchPolicy:
    """Limits on fetching. Override the ``check_`` methods for finer rules; they raise ``MediaError``.

    ``files``: paths and ``file:`` URIs may be read. ``urls``: ``http(s):`` may be fetched. ``public_only``: only
    from addresses of the public internet, checked for every connection and redirect (no proxy is used then).
    ``max_bytes`` of a download or data URI; ``timeout`` seconds of a whole download; ``redirects`` that are followed;
    ``max_pixels`` that a picture's header may announce.
    """

    files: bool = True
    urls: bool = True
    public_only: bool = False
    max_bytes: int = 256 * 2**20
    timeout: float = 60.0
    redirects: int = 5
    max_pixels: int = 100_000_000

    def check_file(self, path: Path) -> None:
        if not self.files:
            raise MediaError("local files can't be read here: send the picture or video as a data URI")

    def check_url(self, url: str) -> None:
        if not self.urls:
            raise MediaError("URLs can't be fetched here: send the picture or video as a data URI")

    def allows_address(self, address: Address) -> bool:
        """Asked before each connection when ``public_only`` is set."""
        if isinstance(address, ipaddress.IPv6Address):
            inner = address.ipv4_mapped or address.sixtofour
            if inner is not None:
                return self.allows_address(inner)
        return address.is_global and not address.is_multicast
