"""HTTP connections under watch: heads that do not come, grow without end, or answers nobody takes. uvicorn's own protocol, guarded.

uvicorn (httptools) takes a head of any size for any time; a connection that says nothing at all is kept for ever, and so is one whose
keep-alive timer was stopped by a byte that begins no request. Here every connection has one watch, from its first moment to its last:
`_look` runs when the patience with what is now the matter ends (`_patience_ends`: the one place that says how long anything may last) and
always arms itself again. A request that arrives in one piece, as nearly all do, arms nothing of ours.

Nor does uvicorn linger: a request refused by its head alone, while its body is still on the way, is answered and its
connection closed, and the kernel answers the body with a reset, which at the client destroys the answer before it is read.
Here such a connection is closed one way only, and what still comes is thrown away for a moment (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import ClientIdle, ElbowError, HeadTooLarge, Overloaded, error_response
from service.telemetry import Metrics

if sys.platform == "linux":
    import fcntl
    import termios

BACK_IN_S = 1.0
LINGER_S = 1.0
"""After an answer that did not wait for the request's end: time for the client to read it before the connection is gone."""
LEAST_TAKEN = 16_384
"""Bytes of what waits for a client, or all of it if less, that it must take within `send_s`."""


@dataclass(frozen=True)
class Patience:
    """What one client may cost before it has asked for anything.

    Attributes:
        head_s: for a request's head to arrive; also for a new connection to say anything.
        send_s: for a client to take some of what was sent: LEAST_TAKEN, or all if that is less.
        max_head_bytes: of request line and headers. max_connections: open at once.
        max_lingering: beside them, closed but for what the client still sends; beyond it the oldest is cut.
    """

    head_s: float = 10.0
    send_s: float = 30.0
    max_head_bytes: int = 16_384
    max_connections: int = 4096
    max_lingering: int = 256


def guarded(patience: Patience, metrics: Metrics) -> type[HttpToolsProtocol]:
    """The protocol class to give to uvicorn."""
    lingering: dict[GuardedProtocol, None] = {}  # the oldest first

    class GuardedProtocol(HttpToolsProtocol):
        _head_open, _head_bytes = False, 0
        _lingers = _closes = _upgraded = False
        _due, _moved_at = 0, 0.0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._last_words = _LastWords(self)
            self._since = self.loop.time()  # what is now the matter began: the connection, a head, idling, lingering, closing
            self._watch = self.loop.call_later(min(patience.head_s, patience.send_s / 4), self._look)
            metrics.connections.set(len(self.connections))
            if len(self.connections) - len(lingering) > patience.max_connections:
                self._refuse(Overloaded(f"{patience.max_connections} connections are open, no more are taken", retry_after_s=BACK_IN_S))

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lingering.pop(self, None)
            metrics.connections.set(len(self.connections))
            self._watch.cancel()

        def data_received(self, data: bytes) -> None:
            if self._lingers or self.transport.is_closing():
                return
            super().data_received(data)
            if self._head_open:
                self._head_bytes += len(data)
                if self._head_bytes > patience.max_head_bytes:
                    self._refuse(_too_large())
            if not (self._upgraded or self._in_work()):
                self._look_by(self._patience_ends(unsent=0)[0])

        def eof_received(self) -> None:
            if self._lingers:
                self.transport.close()

        def shutdown(self) -> None:
            if not self._lingers:
                super().shutdown()

        def linger(self) -> None:
            """Says no more, and hears the client out for LINGER_S after it has taken everything."""
            if self._lingers or self.transport.is_closing():
                return
            self._lingers, self._since = True, self.loop.time()
            if self.transport.can_write_eof():  # TLS has no half-closed connections
                self.transport.write_eof()
            self._look_by(self._since + LINGER_S)
            lingering[self] = None
            if len(lingering) > patience.max_lingering:
                oldest = next(iter(lingering))
                del lingering[oldest]
                self.connections.discard(oldest)
                oldest.transport.abort()

        def handle_websocket_upgrade(self) -> None:
            self._head_open = False
            if self.transport.is_closing() or self._lingers:  # its head was too large
                return
            self._upgraded, self._moved_at = True, self.loop.time()
            super().handle_websocket_upgrade()
            self._watch.cancel()  # how long it may say nothing is the stream's to know
            self._look_at_reader()
            metrics.connections.set(len(self.connections))

        def is_about_to_ask(self, patience_s: float) -> bool:
            """Whether it was made less than `patience_s` ago, or began to ask then, and has not asked anything yet."""
            asked = self.cycle is not None or self._upgraded or self._lingers or self.transport.is_closing()
            return not asked and self.loop.time() - self._since < patience_s

        # Called by the parser, within data_received.

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_open, self._head_bytes, self._since = True, 0, self.loop.time()

        def on_headers_complete(self) -> None:
            self._head_open = False
            if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > patience.max_head_bytes:
                self._refuse(_too_large())
                return
            super().on_headers_complete()
            if self.cycle is not None:
                self.cycle.transport = self._last_words  # type: ignore[assignment]  # the three methods a cycle uses

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.cycle is not None:
                super().on_message_complete()

        # Called by a request's answer, and by uvicorn's timer after it.

        def on_response_complete(self) -> None:
            self._since = self.loop.time()
            super().on_response_complete()

        def timeout_keep_alive_handler(self) -> None:
            self._look()

        # The watch.

        def _look(self) -> None:
            now = self.loop.time()
            unsent, acknowledged = _unsent(self.transport)
            if acknowledged >= self._due:
                self._moved_at, self._due = now, acknowledged + min(unsent, LEAST_TAKEN)
            if (unsent and not self._head_open) or self.transport.is_closing() > self._closes:
                self._since, self._closes = now, self.transport.is_closing()  # who is still reading is not yet idle
            ends, end = self._patience_ends(unsent)
            if now >= ends:
                end()
                ends = now + LINGER_S
            self._watch.cancel()
            self._watch = self.loop.call_at(min(ends, now + (LINGER_S if self._lingers else patience.send_s) / 4), self._look)

        def _look_at_reader(self) -> None:
            """Of a WebSocket: cut when its client takes nothing of what was sent, be it only pongs, or after the last word."""
            if self.transport.get_extra_info("socket").fileno() < 0:
                return
            now = self.loop.time()
            unsent, acknowledged = _unsent(self.transport)
            if acknowledged >= self._due or not unsent:
                self._moved_at, self._due = now, acknowledged + min(unsent, LEAST_TAKEN)
            if now >= self._moved_at + patience.send_s:
                self.transport.abort()
                return
            self._watch = self.loop.call_later(patience.send_s / 4, self._look_at_reader)

        def _look_by(self, when: float) -> None:
            if when < self._watch.when():
                self._watch.cancel()
                self._watch = self.loop.call_at(when, self._look)

        def _patience_ends(self, unsent: int) -> tuple[float, Callable[[], None]]:
            """When, and what happens then."""
            if unsent:
                return self._moved_at + patience.send_s, self.transport.abort
            if self.transport.is_closing():  # by TLS, whose peer has yet to say goodbye
                return self._since + LINGER_S, self.transport.abort
            if self._lingers:
                return self._since + LINGER_S, self.transport.close
            if self._in_work():  # how long its body may take is the application's to say
                return math.inf, _nothing
            if self._head_open:
                return self._since + patience.head_s, self._refuse_slow_head
            idle_s = patience.head_s if self.cycle is None else self.timeout_keep_alive
            return self._since + idle_s, self._last_words.close  # it asks nothing: it is not told anything either

        def _in_work(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _refuse_slow_head(self) -> None:
            self._refuse(ClientIdle(f"the head of the request did not arrive within {patience.head_s:g} s"))

        def _refuse(self, error: ElbowError) -> None:
            """Answers what is no request yet: nothing of it reaches the application."""
            if self.transport.is_closing():
                return
            metrics.refused(error.code, None)
            self._head_open = False
            response = error_response(error, "", "")
            headers = {name.lower(): value for name, value in response.headers.items()} | {"connection": "close"}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            status = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n"
            self.transport.write((status + head + "\r\n").encode() + bytes(response.body))
            self.linger()

    return GuardedProtocol


class _LastWords:
    """The transport as a request's answer sees it: closing it waits for what the client is still sending."""

    def __init__(self, protocol: Any):
        self._protocol, self.write, self.is_closing = protocol, protocol.transport.write, protocol.transport.is_closing

    def close(self) -> None:
        cycle, transport = self._protocol.cycle, self._protocol.transport
        if (cycle is not None and cycle.more_body) or (not transport.can_write_eof() and _unsent(transport)[0] > LEAST_TAKEN):
            self._protocol.linger()  # closing TLS would give what it still holds 30 s
        else:
            transport.close()


def _unsent(transport: Any) -> tuple[int, int]:
    """(bytes that the client has not acknowledged, a count that grows with those that it has).

    The kernel is asked because it takes from a full buffer in large bites, seldom, and because what lies behind TLS is seen nowhere else.
    """
    held: int = transport.get_write_buffer_size()
    if sys.platform == "linux":
        try:
            connection = transport.get_extra_info("socket")
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
            (queued,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
            (acknowledged,) = struct.unpack_from("Q", info, 120)  # tcpi_bytes_acked
            return held + queued, acknowledged
        except (OSError, struct.error):  # no TCP, or an old kernel
            pass
    return held, -held


def _nothing() -> None:
    """Who is in work is not cut."""


def _too_large() -> HeadTooLarge:
    return HeadTooLarge("request line and headers are larger than this server takes")
