"""A request's id, from its first log line to the header of its response.

It is in a context variable, which a task inherits from the one that starts it: whatever is logged on behalf
of a request carries its id, with nobody handing it on.
"""

import logging
import re
import time
import uuid
from contextvars import ContextVar
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serve.api_errors import failure_response
from pipelines.serve.tracing import describe, request_span

__all__ = ["Identified", "RequestIdFilter", "request_id"]

log = logging.getLogger("ldm.serve")

HEADER = "x-request-id"
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
NOT_ANSWERED = 499  # nginx's number for a client that left; nobody receives it
MAX_PATH_CHARS = 200
FOR_BROWSERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}

request_id: ContextVar[str] = ContextVar("request_id", default="-")


class RequestIdFilter(logging.Filter):
    """Gives every record ``request_id``, ``-`` outside of requests.

    For a handler, as a logger's filters do not see the records of the loggers below it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class Identified:
    """An ASGI app around ``app``, for HTTP: an id for each request, and one line in the access log.

    The id is the client's ``x-request-id``, if that is 1 to 64 letters, digits, dots, dashes or underscores,
    else a new one. It is in ``scope["state"]`` and in the answer, which also gets the headers that browsers
    are to obey. What ``app`` raises is logged, answered with 500 where no answer has begun, and raised again.
    """

    def __init__(self, app: ASGIApp, *, echoes_id: bool = True) -> None:
        """echoes_id: False where whatever stands before this puts the id into the answer."""
        self.app, self.echoes_id = app, echoes_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, headers = time.perf_counter(), Headers(scope=scope)
        reply = _Reply(send, _accepted_or_new(headers.get(HEADER)), self.echoes_id)
        scope.setdefault("state", {})["request_id"] = reply.request_id
        token = request_id.set(reply.request_id)
        try:
            with request_span(scope["method"], _told_path(scope), headers, reply.request_id) as span:
                await self.app(scope, receive, reply.send)
                describe(span, status=reply.status or NOT_ANSWERED)
        except Exception:
            log.exception("%s %s failed", scope["method"], _told_path(scope))
            if reply.status is None:
                await failure_response(reply.request_id)(scope, receive, reply.send)
            raise
        finally:
            _log_access(scope, reply, 1000 * (time.perf_counter() - started))
            request_id.reset(token)


class _Reply:
    """The answer to a request: adds what all answers have, and remembers the status; None: not begun."""

    def __init__(self, send: Send, request_id: str, echoes_id: bool) -> None:
        self._send, self.request_id, self._echoes_id = send, request_id, echoes_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers.update(FOR_BROWSERS)
            if self._echoes_id:
                headers[HEADER] = self.request_id
        await self._send(message)


def _accepted_or_new(proposed: str | None) -> str:
    return proposed if proposed is not None and SANE.fullmatch(proposed) else uuid.uuid4().hex


def _told_path(scope: Scope) -> str:
    """For logs: on one line whatever the client sent, and without the query."""
    return quote(scope["path"], errors="replace")[:MAX_PATH_CHARS]


def _log_access(scope: Scope, reply: _Reply, milliseconds: float) -> None:
    log.info(
        "%s %s %d %.1f ms principal=%s request_id=%s",
        scope["method"],
        _told_path(scope),
        reply.status or NOT_ANSWERED,
        milliseconds,
        scope["state"].get("principal", "-"),
        reply.request_id,
    )
