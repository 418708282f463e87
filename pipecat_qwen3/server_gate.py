"""Every request and socket goes through here: its id, its key, the limits, one line of log.

Plain ASGI, so that streams pass untouched.
"""

import hmac
import logging
import re
import time
import uuid
from collections import Counter

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipecat_qwen3.errors import UnauthorizedError
from pipecat_qwen3.server_http import failure, refusal
from pipecat_qwen3.server_log import request_id
from pipecat_qwen3.server_speaker import Speaker

logger = logging.getLogger("pipecat_qwen3.access")

OPEN_PATHS = ("/health", "/ready")
"""What an orchestrator asks without a key, and however many connections there are."""

_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, speaker: Speaker, api_key: str | None) -> None:
        self._app, self._speaker = app, speaker
        self._key = api_key.encode() if api_key else None
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        token = request_id.set(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        began, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (b"x-request-id", request_id.get().encode())],
                }
            await send(message)

        client = (scope.get("client") or ("",))[0]
        self._open[client] += 1
        self._speaker.metrics.connections.set(self._open.total())
        try:
            no = None if scope["path"] in OPEN_PATHS else self._refuse(headers, self._open[client])
            if no is not None:
                await no(scope, receive, answer)
            else:
                await self._app(scope, self._limited(receive), answer)
        finally:
            self._open[client] -= 1
            self._open += Counter()  # forgets those that have none
            self._speaker.metrics.connections.set(self._open.total())
            if scope["path"] not in OPEN_PATHS:
                method = scope.get("method", "WEBSOCKET")
                told = {"method": method, "path": scope["path"], "status": status}
                logger.info("request", extra={**told, "seconds": round(time.monotonic() - began, 4)})
            request_id.reset(token)

    def _refuse(self, headers: Headers, of_client: int) -> Response | None:
        limits = self._speaker.limits
        if self._key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
                wanted = UnauthorizedError("this server wants an API key: Authorization: Bearer KEY")
                return failure(wanted)
        for count, most, whose in (
            (self._open.total(), limits.connections, "are open"),
            (of_client, limits.per_client or limits.connections, "of this address are open"),
        ):
            if count > most:
                return refusal(
                    429, f"{most} connections {whose} already; try again later", "overloaded", "rate_limit_error"
                )
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > limits.body:
            return refusal(413, f"a body should have at most {limits.body} bytes", "bad_request")
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Count the body, which may come without a length."""
        left = self._speaker.limits.body

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise HTTPException(413, f"a body should have at most {self._speaker.limits.body} bytes")
            return message

        return counted
