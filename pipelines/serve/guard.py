"""What stands before the API: nothing reaches the app that has not been let in here.

In this order: an id, the key, the declared size, the rate, the body. What is refused here is told in the form
of `pipelines.serve.api_errors`.

The app gets the whole body at once, and then whether its client has left. The API's bodies are JSON, which is
of no use before it is whole; read here, one that is too large or too slow is answered before anything runs,
and holds one of its key's slots meanwhile. So bodies take ``max_concurrent × max_body_bytes`` a key at most.
Only what is counted so may have a body: a POST under ``/v1/``. Answers are passed on piece by piece.

It belongs around the whole app (``Guard(app, config, keys)``), so that what FastAPI answers to a failure
passes here too. Pages of other sites get in by Starlette's CORS middleware around that, which answers
preflights itself, as these come without a key:

    CORSMiddleware(Guard(app, config, keys), allow_origins=config.allowed_origins,
                   allow_methods=["GET", "POST"], allow_headers=["Authorization"],
                   expose_headers=["x-request-id", "Retry-After"])
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serve.api_errors import ApiError, error_response, restarting
from pipelines.serve.drain import Drain
from pipelines.serve.keys import ANONYMOUS, KeyRing
from pipelines.serve.rates import Allowance, OverLimit, Rates, Slot
from pipelines.serve.request_id import Identified

__all__ = ["AccessConfig", "Guard"]

OPEN_PATHS = {"/", "/healthz", "/readyz"}
OPEN_FOLDER = "/page/"
METRICS = "/metrics"
WORK = "/v1/"
# More of a body than this is not worth reading to keep the connection of a client that was refused.
SMALL_BODY_BYTES = 2**16
CLOSE = {"connection": "close"}


class AccessConfig(BaseModel):
    """Who may ask for how much. Rates are for each key, where the key's own entry does not say otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_file: Path | None = Field(None, description="API keys; without it and LDM_API_KEYS, open to all")
    requests_per_minute: PositiveInt = 600
    max_concurrent: PositiveInt = Field(64, description="requests of one key at the same time")
    max_body_bytes: PositiveInt = 16 * 2**20
    body_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    allowed_origins: tuple[str, ...] = Field((), description="other sites whose pages may use the API")
    open_metrics: bool = Field(False, description="/metrics without a key")


class _ClientLeft(Exception):
    """Before its body was whole."""


class Guard:
    """An ASGI app around ``app``, in `Identified`.

    Puts into ``scope["state"]``: ``principal``, the key's name or ``anonymous``, and ``request_id``. clock:
    of the rates, in seconds. echoes_id: as `Identified` has it. drain: once it has begun, work gets a 503.
    Websockets are closed, as the API has none.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: AccessConfig,
        keys: KeyRing,
        *,
        echoes_id: bool = True,
        clock: Callable[[], float] = time.monotonic,
        drain: Drain | None = None,
    ) -> None:
        self.app, self.config, self.keys = app, config, keys
        self.drain = drain or Drain()
        self.rates = Rates(_allowances(config, keys), clock=clock)
        self.open_paths = OPEN_PATHS | ({METRICS} if config.open_metrics else set())
        self._identified = Identified(self._answer, echoes_id=echoes_id)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._identified(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as until_answered:
            try:
                body = await self._let_in(scope, receive, until_answered)
            except ApiError as refusal:
                response = error_response(
                    refusal.status_code, refusal.detail, code=refusal.code, headers=refusal.headers
                )
                await response(scope, receive, send)
            except _ClientLeft:
                return
            else:
                await self.app(scope, _replayed(body, receive), send)

    async def _let_in(self, scope: Scope, receive: Receive, until_answered: ExitStack) -> bytes:
        """The body of a request that may pass; `ApiError` for one that may not."""
        path = _route_path(scope)
        headers = Headers(scope=scope)
        works = scope["method"] == "POST" and path.startswith(WORK)
        most_bytes = self.config.max_body_bytes if works else 0
        closing = CLOSE if _is_long(headers) else {}
        principal = ANONYMOUS if self._is_open(path) else self._principal(headers, closing)
        scope["state"]["principal"] = principal
        if _declared_bytes(headers) > most_bytes:
            raise _too_large(most_bytes, closing)
        until_answered.enter_context(self.drain.one())
        if works:
            if self.drain.begun:
                raise restarting(headers=CLOSE)
            until_answered.enter_context(self._slot(principal, closing))
        return await self._body(receive, most_bytes)

    def _is_open(self, path: str) -> bool:
        return self.keys.is_open or path in self.open_paths or path.startswith(OPEN_FOLDER)

    def _principal(self, headers: Headers, closing: dict[str, str]) -> str:
        """The name of whose key came with the request."""
        key = _bearer(headers)
        entry = self.keys.find(key) if key else None
        if entry is None:
            what = "this API key is not known" if key else "no API key"
            raise ApiError(
                401,
                f"{what}; send one header: Authorization: Bearer KEY",
                code="invalid_api_key" if key else "missing_api_key",
                headers={"www-authenticate": "Bearer", **closing},
            )
        return entry.name

    def _slot(self, principal: str, closing: dict[str, str]) -> Slot:
        try:
            return self.rates.admit(principal)
        except OverLimit as over:
            wait_s = max(1, ceil(over.retry_after_s))
            allowed = "requests a minute" if over.limit == "rate" else "requests at the same time"
            raise ApiError(
                429,
                f"too many requests; allowed: {over.allowed} {allowed}; ask again in {wait_s} s",
                code="rate_limit_exceeded" if over.limit == "rate" else "concurrency_limit_exceeded",
                headers={"retry-after": str(wait_s), **closing},
            ) from None

    async def _body(self, receive: Receive, most_bytes: int) -> bytes:
        timeout_s = self.config.body_timeout_s
        try:
            return await asyncio.wait_for(_whole(receive, most_bytes), timeout_s)
        except TimeoutError:
            message = f"the body did not come; allowed: {timeout_s:g} s"
            raise ApiError(408, message, code="body_timeout", headers=CLOSE) from None


def _allowances(config: AccessConfig, keys: KeyRing) -> dict[str, Allowance]:
    """By key, or of all together where there are no keys."""
    default = Allowance(config.requests_per_minute, config.max_concurrent)
    own = {
        entry.name: Allowance(
            entry.requests_per_minute or default.requests_per_minute,
            entry.max_concurrent or default.max_concurrent,
        )
        for entry in keys.entries
    }
    return own or {ANONYMOUS: default}


async def _whole(receive: Receive, most_bytes: int) -> bytes:
    # Not a list: of a body that comes byte by byte, the list would take many times the memory.
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        body += message.get("body", b"")
        if len(body) > most_bytes:
            raise _too_large(most_bytes, CLOSE)
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The whole body once, and then what the server says: that the client has left."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


def _too_large(most_bytes: int, closing: dict[str, str]) -> ApiError:
    message = f"the body is too large; allowed: {most_bytes} bytes"
    return ApiError(413, message, code="body_too_large", headers=closing)


def _declared_bytes(headers: Headers) -> int:
    """Of Content-Length; 0 where there is none or it is no number, as what comes is counted anyway."""
    value = headers.get("content-length", "")
    # Python refuses to parse thousands of digits.
    return int(value[:20]) if value.isdecimal() else 0


def _is_long(headers: Headers) -> bool:
    """Whether a refused body is cut off; a short one is let in and thrown away.

    A client that is still sending when the connection closes may never see why.
    """
    return "transfer-encoding" in headers or _declared_bytes(headers) > SMALL_BODY_BYTES


def _bearer(headers: Headers) -> bytes | None:
    """The key of the one Authorization header; None for several, as two readers could take one each."""
    values = headers.getlist("authorization")
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(" ")
    return key.strip(" ").encode("latin-1") if scheme.lower() == "bearer" else None


def _route_path(scope: Scope) -> str:
    """What Starlette's router sees: the path without what the app is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if path == root or path.startswith(root + "/") else path
