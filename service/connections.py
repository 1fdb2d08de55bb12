"""HTTP connections under watch: heads that do not come, grow without end, or answers nobody takes. uvicorn's own protocol, guarded.

uvicorn (httptools) takes a head of any size for any time; a connection that says nothing at all is kept for ever. Timers run only
while something is missing, so that a request that arrives in one piece, as nearly all do, pays for none.

Nor does uvicorn linger: a request refused by its head alone, while its body is still on the way, is answered and its
connection closed, and the kernel answers the body with a reset, which at the client destroys the answer before it is read.
Here such a connection is closed one way only, and what still comes is thrown away for a moment (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import ClientIdle, ElbowError, HeadTooLarge, Overloaded, error_response
from service.telemetry import Metrics

BACK_IN_S = 1.0
LINGER_S = 1.0
"""After an answer that did not wait for the request's end: time for the client to read it before the connection is gone."""


@dataclass(frozen=True)
class Patience:
    """What one client may cost before it has asked for anything.

    Attributes:
        head_s: for a request's head to arrive; also for a new connection to say anything.
        send_s: for a client to take some of what was sent.
        max_head_bytes: of request line and headers. max_connections: open at once.
    """

    head_s: float = 10.0
    send_s: float = 30.0
    max_head_bytes: int = 16_384
    max_connections: int = 4096


def guarded(patience: Patience, metrics: Metrics) -> type[HttpToolsProtocol]:
    """The protocol class to give to uvicorn."""

    class GuardedProtocol(HttpToolsProtocol):
        _head_open, _head_bytes, _lingers = False, 0, False
        _waiting: asyncio.TimerHandle | None = None
        _sending: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._last_words = _LastWords(self)
            metrics.connections.set(len(self.connections))
            if len(self.connections) > patience.max_connections:
                error = Overloaded(f"{patience.max_connections} connections are open, no more are taken", retry_after_s=BACK_IN_S)
                self._refuse(error)
            else:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            metrics.connections.set(len(self.connections))
            self._stop_waiting()
            self._stop_sending()

        def data_received(self, data: bytes) -> None:
            if self._lingers or self.transport.is_closing():
                return
            super().data_received(data)
            if not self._head_open:
                self._stop_waiting()
                return
            self._head_bytes += len(data)
            if self._head_bytes > patience.max_head_bytes:
                self._refuse(_too_large())
            elif self._waiting is None and not self.transport.is_closing():
                self._wait()

        def eof_received(self) -> None:
            if self._lingers:
                self.transport.close()

        def shutdown(self) -> None:
            if not self._lingers:
                super().shutdown()

        def linger(self) -> None:
            """Says no more, and hears the client out for LINGER_S."""
            if self._lingers or self.transport.is_closing():
                return
            self._lingers = True
            self._stop_waiting()
            if self.transport.can_write_eof():  # TLS has no half-closed connections
                self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)

        def handle_websocket_upgrade(self) -> None:
            self._head_open = False
            self._stop_waiting()
            if self.transport.is_closing():  # its head was too large
                return
            super().handle_websocket_upgrade()
            metrics.connections.set(len(self.connections))

        # Called by the parser, within data_received.

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_open, self._head_bytes = True, 0

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

        # Called by the transport when its buffer is full, and when it is no more.

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._sending is None:
                self._sending = self.loop.call_later(patience.send_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_sending()
            super().resume_writing()

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(patience.head_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _stop_sending(self) -> None:
            if self._sending is not None:
                self._sending.cancel()
                self._sending = None

        def _give_up(self) -> None:
            self._waiting = None
            if self._head_open:
                self._refuse(ClientIdle(f"the head of the request did not arrive within {patience.head_s:g} s"))
            elif not self.transport.is_closing():  # it never said anything: it is not told anything either
                self.transport.close()

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
        if self._protocol.cycle.more_body:
            self._protocol.linger()
        else:
            self._protocol.transport.close()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge("request line and headers are larger than this server takes")
