"""MLflow's scoring app with a limit of what a request may weigh; for :func:`medgen.serving.serve`.

The process that imports this module has the model's own copy of this package on its path, not the installed one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["MAX_BODY", "LimitedBody"]

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
        messages, size, more = [], 0, True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > self.limit:
                await self._refuse(send)
                return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, send: Callable[[Message], Awaitable[None]]) -> None:
        line = f"a request may have at most {self.limit} bytes, got more; send fewer or smaller images"
        body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": line}).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def __getattr__(name: str) -> LimitedBody:
    # uvicorn asks for `app`: the model is loaded then, and not by whoever imports the class
    if name == "app":
        from mlflow.pyfunc.scoring_server.app import app as scoring_app

        return LimitedBody(scoring_app)
    raise AttributeError(f"module 'medgen.serving.app' has no attribute {name!r}")
