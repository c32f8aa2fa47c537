"""Around the whole application: how large and how slow a body may be, what browsers may do, what is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine_fast.inference.serving.limits import Limits
from engine_fast.inference.serving.metrics import Metrics

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"


class Gate:
    """ASGI middleware. Content-Security-Policy allows nothing, unless the answer brings a policy of its own."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, headers: Mapping[str, str] = _HEADERS) -> None:
        self._app, self._limits, self._metrics, self._headers = app, limits, metrics, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", _NOTHING)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isdigit() and int(length[:20]) > self._limits.max_body:
                await self._refuse(scope, receive, tell)
            else:
                await self._app(scope, self._bounded(receive), tell)
        finally:
            # The route is a fixed set of names; a path as it came would let clients invent time series.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.answered(path, status, time.perf_counter() - start)

    def _bounded(self, receive: Receive) -> Receive:
        """receive(), until the body is there, at most so large and within its time."""
        deadline = time.monotonic() + self._limits.body_seconds
        size = 0
        complete = False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, "the body took too long to arrive", {"Connection": "close"}) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._limits.max_body:
                raise HTTPException(413, self._too_large(), {"Connection": "close"})
            return message

        return bounded

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The body is not read: whoever announces too much is told, and the connection closed.
        answer = JSONResponse({"detail": self._too_large()}, 413, {"Connection": "close"})
        await answer(scope, receive, send)

    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.max_body} bytes; send fewer sentences at a time"
