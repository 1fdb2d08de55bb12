"""The process: uvicorn around the application, with guarded connections, TLS, and a way out in bounded time.

    SIGTERM ─► unready at once, replies end their connections ─► drain_delay_s, still serving ─► nothing new: 503 ─►
    streams get their tokens, then requests their answers, both within one drain_s ─► connections closed ─► exit

A server whose engine has ended goes the same way, by itself. A second signal, SIGTERM or SIGINT, cuts every wait short: what is not
done by then is answered with 503.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import socket
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from service.connections import Patience, guarded
from service.deps import Server
from service.settings import Settings
from service.telemetry import LOG, Metrics

REPLY_S = 2
"""After the scheduler has stopped, for the last replies to leave."""
LAST_S, SPEAK_S = 0.2, 1.0
"""After the listeners have closed, for connections taken in the last instant: for TLS handshakes and for requests to be refused; longer
where somebody has connected and, on a starved machine, not said yet what for."""
LOOK_S = 0.1


class DrainingServer(uvicorn.Server):
    """At SIGTERM the application leaves in order: nobody is left unanswered, and it takes no longer than it was told to."""

    def __init__(self, config: uvicorn.Config, app: Any, settings: Settings):
        super().__init__(config)
        self._app, self._settings = app, settings
        self.is_broken = False
        """Whether it leaves because nothing is worked on any more, so that whoever watches it starts a fresh one."""

    async def on_tick(self, counter: int) -> bool:
        if not (self.is_broken or self._app.state.server.scheduler.alive):
            self.is_broken = True
            LOG.critical("the engine has ended: this server leaves")
        return await super().on_tick(counter) or self.is_broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        server: Server = self._app.state.server
        server.draining = True
        LOG.info("draining", extra={"delay_s": self._settings.drain_delay_s, "drain_s": self._settings.drain_s})
        await self._wait(asyncio.sleep(self._settings.drain_delay_s))
        server.refusing = True
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.drain_s
        await self._wait(server.hand_over_streams())
        await self._wait(server.stop(max(0.0, until - loop.time())))  # the listeners stay open: who comes late is told so
        if self.force_exit:
            await server.stop(0.0)  # nobody is left unanswered
        await self._take_the_last()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or self.should_exit  # uvicorn lets only SIGINT hurry
        super().handle_exit(sig, frame)

    async def _take_the_last(self) -> None:
        """Ends listening; whoever has connected by then is still let in, to be refused in words.

        A connection that the kernel has made and nobody has accepted is reset when its listener closes. The event loop accepts once an
        iteration, too seldom under load; so a second handle on each listener accepts all there is, and is closed in the same breath.
        """
        loop = asyncio.get_running_loop()
        taken: list[socket.socket] = []
        for server in self.servers:
            handles = [socket.socket(fileno=os.dup(listener.fileno())) for listener in server.sockets]
            server.close()
            for handle in handles:
                handle.setblocking(False)
                with handle:
                    taken += _waiting_at(handle)
        tls = self.config.ssl
        letting_in = [
            loop.connect_accepted_socket(self._protocol, connection, ssl=tls, ssl_handshake_timeout=LAST_S if tls else None)
            for connection in taken
        ]
        await asyncio.gather(*letting_in, return_exceptions=True)  # whose handshake fails, or does not come, concerns nobody else
        await self._wait(self._hear_the_last())

    async def _hear_the_last(self) -> None:
        await asyncio.sleep(LAST_S)
        while any(_is_about_to_ask(connection) for connection in self.server_state.connections):
            await asyncio.sleep(LOOK_S / 4)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return protocol

    async def _wait(self, awaited: Coroutine[Any, Any, None]) -> None:
        """Waits until it is done, or another signal comes; it has one look's time in any case."""
        task = asyncio.ensure_future(awaited)
        for counter in itertools.count():
            await self.on_tick(counter)  # keeps the Date header right
            await asyncio.wait({task}, timeout=LOOK_S)
            if task.done():
                return task.result()
            if self.force_exit:
                break
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _is_about_to_ask(connection: Any) -> bool:
    asks = getattr(connection, "is_about_to_ask", None)  # a WebSocket's connection has asked
    return asks is not None and asks(SPEAK_S)


def _waiting_at(listener: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            yield listener.accept()[0]
        except ConnectionAbortedError:  # it has gone again
            continue
        except OSError:  # nobody is left, or nothing to hold them with
            return


def serve(app: ASGIApp, settings: Settings, metrics: Metrics) -> bool:
    """Serves until SIGTERM or Ctrl-C; False when it could not start, or its engine ended before."""
    patience = Patience(settings.head_s, settings.send_s, settings.max_head_bytes, settings.max_connections)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="auto",  # uvloop where it is installed
        http=guarded(patience, metrics),
        ws="websockets-sansio",
        ws_max_size=settings.max_message_bytes,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=REPLY_S,
    )
    server = DrainingServer(config, app, settings)
    server.run()
    return server.started and not server.is_broken
