"""What every request passes first: the token, and the limit of its size."""

import hmac
from collections.abc import Callable, Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")  # any other word is a client's own: it is not counted by name
UNREAD = {"Connection": "close"}  # the rest of the body is not read


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The form of every error."""
    return JSONResponse({"error": message}, status, headers)


class Authorization:
    """ASGI middleware.

    Args:
      app: the application.
      token: what must follow `Authorization: Bearer`.
      open_paths: these need no token.
      limit: (method, path) -> bytes that the body may have.
      count: (method, route, status) is called after each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        open_paths: Collection[str],
        limit: Callable[[str, str], int],
        count: Callable[[str, str, int], Any],
    ):
        self.app, self.open_paths, self.limit, self.count = app, open_paths, limit, count
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client went before an answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "")
            self.count(scope["method"] if scope["method"] in METHODS else "", route, status)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        limit = self.limit(scope["method"], scope["path"])
        if scope["path"] not in self.open_paths and not self._authorized(headers.get(b"authorization", b"")):
            message = "missing or wrong token; send the header 'Authorization: Bearer TOKEN' with the service's token"
            response = error_response(401, message, {"WWW-Authenticate": "Bearer", **UNREAD})
            await response(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            await error_response(413, too_large(int(declared), limit), UNREAD)(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, too_large(size, limit), UNREAD)
            return message

        await self.app(scope, limited, send)

    def _authorized(self, given: bytes) -> bool:
        return hmac.compare_digest(given, self._expected)


def too_large(size: int, limit: int) -> str:
    """The message of status 413."""
    return f"the body has {size} bytes or more and {limit} are allowed; send it in parts, or raise --max-bytes"
