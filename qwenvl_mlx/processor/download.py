"""Download one URL within a policy's limits."""

from __future__ import annotations

import functools
import http.client
import ipaddress
import socket
import ssl
import time
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
        request = urllib.request.Request(_ascii(url), headers=HEADERS)
        with _opener(policy).open(request, timeout=policy.timeout) as response:
            return _body(response, name, policy)
    except urllib.error.HTTPError as error:
        with error:
            raise MediaError(f"{name} answered {error.code} {error.reason}: check the address") from None
    except urllib.error.URLError as error:
        raise MediaError(
            f"{name} can't be reached ({error.reason}): check the address and the network"
        ) from error
    except TimeoutError as error:
        raise MediaError(
            f"{name} took longer than {policy.timeout:g} s: try again, or fetch it first"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaError(f"{name} can't be fetched ({error}): check the address") from error


def _body(response: Any, name: str, policy: FetchPolicy) -> bytes:
    deadline = time.monotonic() + policy.timeout
    chunks, total = [], 0
    while chunk := response.read1(
        CHUNK
    ):  # read1 waits for one packet only: a slow sender can't outlast the deadline
        chunks.append(chunk)
        total += len(chunk)
        if total > policy.max_bytes:
            raise MediaError(f"{name} is larger than {policy.max_bytes >> 20} MiB: send a smaller file")
        if time.monotonic() > deadline:
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


def _opener(policy: FetchPolicy) -> urllib.request.OpenerDirector:
    """Opens http(s) only: urllib's default would also take ftp:, file: and data:."""
    opener = urllib.request.OpenerDirector()
    if policy.public_only:
        handlers: list[urllib.request.BaseHandler] = [_PublicHTTP(policy), _PublicHTTPS(policy)]
    else:
        https = urllib.request.HTTPSHandler(context=_tls())
        handlers = [urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), https]
    errors = [
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(policy),
    ]
    for handler in (*handlers, *errors):
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


class _Public(http.client.HTTPConnection):
    def __init__(self, host: str, *, policy: FetchPolicy, **kwargs: Any) -> None:
        super().__init__(host, **kwargs)
        self.policy = policy

    def connect(self) -> None:
        self.sock = _dial(self.host, self.port, self.timeout, self.policy)


class _PublicTLS(http.client.HTTPSConnection):
    def __init__(self, host: str, *, policy: FetchPolicy, **kwargs: Any) -> None:
        super().__init__(host, **kwargs)
        self.policy = policy

    def connect(self) -> None:
        self.sock = _tls().wrap_socket(
            _dial(self.host, self.port, self.timeout, self.policy), server_hostname=self.host
        )


class _PublicHTTP(urllib.request.HTTPHandler):
    def __init__(self, policy: FetchPolicy) -> None:
        super().__init__()
        self.policy = policy

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Public, policy=self.policy), req)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def __init__(self, policy: FetchPolicy) -> None:
        super().__init__()
        self.policy = policy

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_PublicTLS, policy=self.policy), req)
