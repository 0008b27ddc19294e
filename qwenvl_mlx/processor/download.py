"""Download one URL within a policy's limits."""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.processor.policy import FetchPolicy

CHUNK = 1 << 16
HEADERS = {"User-Agent": "qwenvl-mlx", "Accept": "*/*", "Accept-Encoding": "identity"}


def download(url: str, policy: FetchPolicy) -> bytes:
    """The body of ``url``. Raises ``MediaError`` that names it."""
    policy.check_url(url)
    name = url if len(url) <= 100 else url[:97] + "..."
    try:
        with _Line(policy) as line:
            return _fetch(_ascii(url), name, line)
    except urllib.error.HTTPError as error:
        with error:
            raise MediaError(f"{name} answered {error.code} {error.reason}: check the address") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if line.hung_up or isinstance(getattr(error, "reason", error), TimeoutError):
            late = f"{name} took longer than {policy.timeout:g} s: try again, or fetch it first"
            raise MediaError(late) from error
        reason = getattr(error, "reason", error)
        raise MediaError(f"{name} can't be reached ({reason}): check the address and the network") from error


def _fetch(url: str, name: str, line: _Line) -> bytes:
    policy = line.policy
    with _opener(line).open(urllib.request.Request(url, headers=HEADERS), timeout=policy.timeout) as response:
        chunks, total = [], 0
        while chunk := response.read(CHUNK):
            chunks.append(chunk)
            total += len(chunk)
            if total > policy.max_bytes:
                raise MediaError(f"{name} is larger than {policy.max_bytes >> 20} MiB: send a smaller file")
        if line.hung_up:
            raise TimeoutError
        if response.length:  # what the header promised and did not come
            raise MediaError(f"{name} broke off after {total} bytes: try again")
    return b"".join(chunks)


def _ascii(url: str) -> str:
    """The URL with its host in IDNA and everything else that isn't ASCII (or is a blank) percent-encoded."""
    parts = urlsplit(url.strip())
    if not parts.hostname:
        raise ValueError("it has no host")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    safe = "/%:@!$&'()*+,;=~-._?[]"
    return urlunsplit((parts.scheme, host, quote(parts.path, safe=safe), quote(parts.query, safe=safe), ""))


class _Line:
    """The sockets of one download. They are shut when its time is over, however slowly the other side talks."""

    def __init__(self, policy: FetchPolicy) -> None:
        self.policy = policy
        self.hung_up = False
        self._sockets: list[socket.socket] = []
        self._alarm = threading.Timer(policy.timeout, self._hang_up)
        self._alarm.daemon = True

    def __enter__(self) -> _Line:
        self._alarm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._alarm.cancel()

    def add(self, opened: socket.socket) -> None:
        self._sockets.append(opened)

    def _hang_up(self) -> None:
        self.hung_up = True
        for opened in self._sockets:
            with contextlib.suppress(OSError):  # closed meanwhile
                socket.socket.shutdown(
                    opened, socket.SHUT_RDWR
                )  # not TLS's own, which another thread may be reading


def _opener(line: _Line) -> urllib.request.OpenerDirector:
    """Opens http(s) only: urllib's default would also take ftp:, file: and data:."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [_HTTP(line), _HTTPS(line), _Redirects(line.policy)]
    handlers += [urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()]
    if not line.policy.public_only:
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(
        certifi.where()
    )  # Python from python.org on a Mac comes without certificates
    return context


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = 1000  # the policy counts instead

    def __init__(self, policy: FetchPolicy) -> None:
        self.policy = policy

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if sum(getattr(req, "redirect_dict", {}).values()) >= self.policy.redirects:
            raise MediaError(f"{req.full_url[:100]} redirects too often: give the final address")
        if not newurl.lower().startswith(("http://", "https://")):
            raise MediaError(
                f"{req.full_url[:100]} redirects to {newurl[:100]}: only http and https are fetched"
            )
        self.policy.check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _dial(host: str, port: int, timeout: float | None, policy: FetchPolicy) -> socket.socket:
    """Connect to an address that was vetted itself: looking the name up twice would let it change in between."""
    refused: OSError | None = None
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not policy.allows_address(ipaddress.ip_address(str(address[0]).partition("%")[0])):
            continue
        try:
            return socket.create_connection((str(address[0]), port), timeout)
        except OSError as error:
            refused = error
    if refused is not None:
        raise refused
    raise MediaError(f"{host} is not on the public internet: send the picture or video as a data URI")


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, line: _Line, **options: Any) -> None:
        super().__init__(host, **options)
        self.line = line

    def connect(self) -> None:
        if self.line.policy.public_only:
            self.sock = _dial(self.host, self.port, self.timeout, self.line.policy)
        else:
            super().connect()
        self.line.add(self.sock)


class _TLSConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, line: _Line, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(host, context=tls, **options)
        self.line = line
        self.tls = tls

    def connect(self) -> None:
        if self.line.policy.public_only:
            plain = _dial(self.host, self.port, self.timeout, self.line.policy)
            self.line.add(plain)
            self.sock = self.tls.wrap_socket(plain, server_hostname=self.host)
        else:
            super().connect()
        self.line.add(self.sock)


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, line: _Line) -> None:
        super().__init__()
        self.line = line

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, line=self.line), req)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, line: _Line) -> None:
        super().__init__()
        self.line = line

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_TLSConnection, line=self.line, tls=_tls()), req)
