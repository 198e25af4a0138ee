"""MLflow's scoring app with a limit of what a request may weigh; for :func:`medgen.serving.serve`.

The process that imports this module has the model's own copy of this package on its path, not the installed one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from medgen.serving.limits import ARRIVED

__all__ = ["MAX_BODY", "LimitedBody"]

DISCARDED = 8  # times the limit, of a body that is refused
MAX_BODY = 64 * 2**20  # bytes: eight radiographs of 2048 pixels and 16 bits, or one of 1500 pixels as an array

Message = MutableMapping[str, Any]


class LimitedBody:
    """ASGI middleware that answers 413 to a request that is too large, before it lies in memory.

    Args:
        app: to hand other requests to.
        limit: bytes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int = MAX_BODY) -> None:
        self.app, self.limit = app, limit

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(receive, send, 0)
            return
        messages, size, more = [], 0, True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > self.limit:
                messages.clear()
                await self._refuse(receive if more else None, send, size)
                return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        ARRIVED.set(time.monotonic())
        await self.app(scope, replay, send)

    async def _refuse(
        self, receive: Callable[[], Awaitable[Message]] | None, send: Callable[[Message], Awaitable[None]], size: int
    ) -> None:
        line = f"a request may have at most {self.limit} bytes, got more; send fewer or smaller images"
        body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": line}).encode()
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # most clients read no answer before they have sent all, and are reset if the connection closes before
        while receive is not None and size <= DISCARDED * self.limit:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.body", "body": b""})


def __getattr__(name: str) -> LimitedBody:
    # uvicorn asks for `app`: the model is loaded then, and not by whoever imports the class
    if name == "app":
        try:
            from mlflow.pyfunc.scoring_server.app import app as scoring_app
        except AttributeError as error:
            # uvicorn would take it for its own, and say that there is no app in this module
            raise RuntimeError(f"the model cannot be loaded: {error}") from error
        return LimitedBody(scoring_app)
    raise AttributeError(f"module 'medgen.serving.app' has no attribute {name!r}")
