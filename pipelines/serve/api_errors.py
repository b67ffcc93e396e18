"""The one form of an error of the API: ``{"error": {"message", "type", "param", "code"}}``, as OpenAI's.

A message is one line: which field, what kind of value came, what is allowed. It never holds the value, which
may be a prompt, or megabytes, or a number that JSON does not have; nor what an unexpected exception says.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["ApiError", "error_body", "error_response", "failure_response", "install", "invalid", "restarting"]

TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
MAX_MESSAGE_CHARS = 300
MAX_NAME_CHARS = 64
# pydantic's, where the value that came is the object around the field, or where the message tells of it.
TOLD_WITHOUT_VALUE = {"missing", "extra_forbidden", "json_invalid", "value_error", "assertion_error"}
# FastAPI puts where a value was before the field's name.
PLACES = {"body", "query", "path", "header"}


class Invalid(NamedTuple):
    """What is wrong with a request; ``param``: the field, None for the whole; ``code``: pydantic's."""

    message: str
    param: str | None
    code: str


class ApiError(HTTPException):
    """An answer that the app gives up with, where a plain ``HTTPException`` says too little."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.param, self.code = param, code


def restarting(retry_after_s: int = 1, headers: Mapping[str, str] | None = None) -> ApiError:
    """503, of what takes no more work and ends what it has."""
    message = "this server is being restarted; try again"
    return ApiError(
        503, message, code="restarting", headers={"Retry-After": str(retry_after_s), **(headers or {})}
    )


def error_body(
    message: str, type: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """What goes over the wire, also as the data of a stream's ``error`` event."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_response(
    status_code: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The error as a response; its type follows from the status."""
    body = error_body(message, _type(status_code), param, code)
    # Not JSONResponse: JSON can bring half a surrogate pair, which only escaped ASCII can take back.
    return Response(json.dumps(body), status_code, headers, media_type="application/json")


def failure_response(request_id: str) -> Response:
    """500, for a mistake of ours: nothing of it but the id that its log lines have."""
    message = f"internal error; tell the operator of this server the request id {request_id}"
    return error_response(500, message, code="internal_error")


def invalid(errors: Sequence[Mapping[str, Any]]) -> Invalid:
    """The first of pydantic's ``errors()``, in one line of at most 300 characters, and how many there are."""
    error = errors[0]
    param = _field(error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] not in TOLD_WITHOUT_VALUE and "input" in error:
        message = f"{message}; got {_kind(error['input'])}"
    if param is not None:
        message = f"{param}: {message}"
    message = _shortened(" ".join(message.split()), MAX_MESSAGE_CHARS)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Invalid(message + more, param, error["type"])


def install(app: FastAPI) -> None:
    """Make every error of ``app`` come in this form.

    A pydantic ``ValidationError``, where the app validates with a context of its own, has to be raised as
    ``RequestValidationError(error.errors())``: one that nobody expected is a mistake of ours, and a 500.
    """
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_failure)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = invalid(error.errors())
    return error_response(400, found.message, param=found.param, code=found.code)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        return Response(status_code=error.status_code, headers=error.headers)
    param, code = (error.param, error.code) if isinstance(error, ApiError) else (None, None)
    return error_response(error.status_code, str(error.detail), param=param, code=code, headers=error.headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    return failure_response(request.scope.get("state", {}).get("request_id", "-"))


def _type(status_code: int) -> str:
    if status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    return TYPES.get(status_code, "invalid_request_error")


def _field(loc: Sequence[str | int]) -> str | None:
    """``n``, ``tags.3``; None for the body as a whole, and for JSON that does not parse."""
    names = loc[1:] if loc and loc[0] in PLACES else loc
    if not names or isinstance(names[0], int):
        return None
    return _shortened(".".join(map(str, names)), MAX_NAME_CHARS)


def _kind(value: object) -> str:
    """JSON's name for it, with its length where it has one."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, (str, bytes)):
        return f"a string of {len(value)} characters"
    return f"an array of {len(value)}" if isinstance(value, (list, tuple)) else "an object"


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"
