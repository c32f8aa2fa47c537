"""From an address to a running server: one socket, one process, ended by SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from engine_fast.errors import ConfigError
from engine_fast.inference.serving.limits import Limits

_BACKLOG = 2048
_KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than the minute for which proxies and clients hold theirs, because
whoever writes to a connection just as it is closed loses the request."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def run(app: FastAPI, limits: Limits, *, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve until a signal; then answer what was accepted, within limits.drain_seconds, and return.

    say: told the address in one line, once connections are taken. Raises ConfigError for an address that cannot be had.
    """
    logging.basicConfig(format="engine-fast: %(message)s", level=logging.WARNING)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(limits.drain_seconds) + 1,
        ws="none",
    )
    with bind(host, port) as listening:
        # uvicorn raises the signal that ended it once more, for whoever handled it before: it has done its work.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        _Server(config, lambda: say(f"serving at {address(listening)}")).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host {host} --port {port}: this address cannot be used ({error}). "
            "Choose another; port 0 takes a free one."
        ) from error
    # Connections inherit it. asyncio sets it only on sockets that name TCP as their protocol, which this one does not;
    # without it the body of an answer waits 40 ms for the client to acknowledge the headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
