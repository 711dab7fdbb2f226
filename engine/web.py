"""What is behind an http(s) URL, by one deadline: for addresses, headers, redirects and body alike.

The standard library gives every wait on a socket the whole time-out again, so a server that sends
a byte now and then keeps a caller for ever. Here each wait gets what is left.
"""

from __future__ import annotations

import io
import socket
import string
import time
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import FTPHandler, HTTPHandler, HTTPSHandler, Request, build_opener

from ..errors import Error

_HEADERS = 8 << 20  # bytes that the standard library may read of headers


class WebError(Error):
    """No body, and why."""


def get(url: str, timeout: float, limit: int) -> bytes:
    """The body behind `url`: at most `limit` bytes, within `timeout` seconds.

    Only the look-up of a host's name is the system's and keeps its own time. Raises WebError for a
    bad address, no answer, a status other than success, and a body too long or cut short.
    """
    deadline = time.monotonic() + timeout
    body = bytearray()
    try:
        # As browsers do: spaces and letters outside ASCII are escaped, what is escaped stays.
        address = quote(url, safe=string.punctuation)
        request = Request(address, headers={"User-Agent": "alexnet-triton"})
        opener = build_opener(_Handler(deadline, limit + _HEADERS))
        with opener.open(request, timeout=timeout) as response:
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > limit:
                    raise WebError(f"is longer than the {limit} bytes that are fetched")
            if response.length:  # what the server promised and did not send
                raise WebError(f"ends {response.length} bytes before the length that was announced")
    except HTTPError as error:
        with error:  # it is the open response, too
            reason = " ".join(str(error.reason).split())
            raise WebError(f"server answered {error.code} {reason}") from None
    except (OSError, HTTPException, ValueError, OverflowError) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            cause = f"no complete answer within {timeout:g} s"
        raise WebError(f"cannot be fetched: {' '.join(str(cause).split())}") from error
    return bytes(body)


def _left(deadline: float) -> float:
    """Seconds until then. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Reader(io.RawIOBase):
    """What a socket sends: each wait ends at the deadline, and so many bytes are enough.

    urllib reads the body of a redirect before it follows it, whatever its length.
    """

    def __init__(self, sock: socket.socket, deadline: float, most: int) -> None:
        self._sock, self._deadline, self._left = sock, deadline, most
        self._bytes = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        count = self._bytes.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise WebError("sends more than is fetched")
        self._sock.settimeout(_left(self._deadline))  # for a handshake of TLS behind a proxy
        return count

    def close(self) -> None:
        self._bytes.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(
        self, deadline: float, most: int, sock: socket.socket, *more: Any, **named: Any
    ) -> None:
        super().__init__(sock, *more, **named)
        self.fp.close()
        self.fp = io.BufferedReader(_Reader(sock, deadline, most))


def _connected(deadline: float, address: tuple[str, int], *more: Any) -> socket.socket:
    """A connection to the first of a host's addresses that takes one, each in its share of time."""
    cause = OSError("its host has no address")
    addresses = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    for tried, (_, _, _, _, place) in enumerate(addresses):
        share = _left(deadline) / (len(addresses) - tried)
        try:
            connection = socket.create_connection((str(place[0]), int(place[1])), share)
        except OSError as error:
            cause = error
        else:
            connection.settimeout(_left(deadline))  # for the handshake of TLS, and the question
            return connection
    raise cause


class _Handler(HTTPHandler, HTTPSHandler, FTPHandler):
    """Opens what urllib opens, and redirects to, by one deadline."""

    def __init__(self, deadline: float, most: int) -> None:
        super().__init__()
        self._deadline, self._most = deadline, most

    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPConnection), req)

    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(partial(self._connection, HTTPSConnection), req)

    def ftp_open(self, req: Request) -> NoReturn:
        raise URLError("its server sends us to FTP")

    def _connection(self, kind: type[HTTPConnection], *where: Any, **how: Any) -> HTTPConnection:
        connection = kind(*where, **how)
        response = partial(_Response, self._deadline, self._most)
        connection.response_class = response  # type: ignore[assignment]
        connection._create_connection = partial(_connected, self._deadline)  # type: ignore[attr-defined]
        return connection
