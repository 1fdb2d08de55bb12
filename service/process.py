"""The process: uvicorn around the application, with guarded connections, TLS, and a way out in bounded time.

    SIGTERM ─► unready at once, replies end their connections ─► drain_delay_s, still serving ─► nothing new: 503 ─►
    streams get their tokens, requests their answers, within drain_s ─► connections closed ─► exit

A second signal cuts every wait short.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from service.connections import Patience, guarded
from service.deps import Server
from service.settings import Settings
from service.telemetry import LOG, Metrics

REPLY_S = 2
"""After the scheduler has stopped, for the last replies to leave."""
LAST_S = 0.2
"""After the listeners have closed, for requests of connections taken in the last instant to be read and refused."""
LOOK_S = 0.05


class DrainingServer(uvicorn.Server):
    """At SIGTERM the application leaves in order: nobody is left unanswered, and it takes no longer than it was told to."""

    def __init__(self, config: uvicorn.Config, app: Any, settings: Settings):
        super().__init__(config)
        self._app, self._settings = app, settings

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        server: Server = self._app.state.server
        server.draining = True
        LOG.info("draining", extra={"delay_s": self._settings.drain_delay_s, "drain_s": self._settings.drain_s})
        await self._sleep(self._settings.drain_delay_s)
        server.refusing = True
        await server.hand_over_streams()
        await server.stop(self._settings.drain_s)  # the listeners stay open: who comes late is told so
        await self._take_the_last()
        await super().shutdown(sockets)

    async def _take_the_last(self) -> None:
        """Ends listening; whoever has connected by then is still let in, to be refused in words.

        A connection that the kernel has made and nobody has accepted is reset when its listener closes. The event loop accepts once an
        iteration, too seldom under load; so a second handle on each listener accepts all there is, and is closed in the same breath.
        """
        loop = asyncio.get_running_loop()
        for server in self.servers:
            handles = [socket.socket(fileno=os.dup(listener.fileno())) for listener in server.sockets]
            server.close()
            for handle in handles:
                handle.setblocking(False)
                with handle:
                    taken = list(_waiting_at(handle))
                for connection in taken:
                    await loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl)
        await self._sleep(LAST_S)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return protocol

    async def _sleep(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        counter = 0
        while (left := until - asyncio.get_running_loop().time()) > 0 and not self.force_exit:
            counter += 1
            await self.on_tick(counter)  # keeps the Date header right
            await asyncio.sleep(min(left, 2 * LOOK_S))


def _waiting_at(listener: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            yield listener.accept()[0]
        except ConnectionAbortedError:  # it has gone again
            continue
        except OSError:  # nobody is left, or nothing to hold them with
            return


def serve(app: ASGIApp, settings: Settings, metrics: Metrics) -> bool:
    """Serves until SIGTERM or Ctrl-C; False when it could not start."""
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
    return server.started
