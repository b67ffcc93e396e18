import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serve.api_errors import ApiError, error_body, install
from pipelines.serve.generation_request import GenerationRequest, Limits

SECRET = "a prompt that nobody else may see"


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str = Field("", max_length=40)
    n: int = Field(1, ge=1, le=4)
    scale: float | None = Field(None, allow_inf_nan=False)
    sides: list[int] = []


def _app() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.post("/orders")
    async def order(order: Order) -> Order:
        return order

    @app.post("/images")
    async def image(request: Request) -> None:
        try:
            GenerationRequest.model_validate_json(await request.body(), context={"limits": Limits()})
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error

    @app.get("/orders/{number}")
    async def get_order(number: int, page: int = 0) -> None: ...

    @app.get("/raise/{what}")
    async def fail(what: str) -> None:
        if what == "plain":
            raise HTTPException(503, "draining", {"Retry-After": "7"})
        if what == "full":
            raise ApiError(404, "no model 'x'", param="model", code="model_not_found")
        if what == "half":
            raise HTTPException(404, "no model '\ud800'")
        if what == "empty":
            raise HTTPException(304)
        raise RuntimeError(SECRET)

    return app


def _send(method: str, path: str, body: bytes | None = None) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(_app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {} if body is None else {"content-type": "application/json"}
            return await client.request(method, path, content=body, headers=headers)

    return asyncio.run(send())


def _error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (
            b'{"prompt": "%s"}' % (b"x" * 41),
            "prompt",
            "prompt: String should have at most 40 characters; got a string of 41 characters",
        ),
        (b'{"n": 5}', "n", "n: Input should be less than or equal to 4; got a number"),
        (b'{"n": null}', "n", "n: Input should be a valid integer; got null"),
        (b'{"n": [1, 2]}', "n", "n: Input should be a valid integer; got an array of 2"),
        (b'{"prompt": {"a": 1}}', "prompt", "prompt: Input should be a valid string; got an object"),
        (b'{"prompt": true}', "prompt", "prompt: Input should be a valid string; got a boolean"),
        (b'{"scale": NaN}', "scale", "scale: Input should be a finite number; got a number"),
        (b'{"scale": -Infinity}', "scale", "scale: Input should be a finite number; got a number"),
        (b'{"scale": 1e999}', "scale", "scale: Input should be a finite number; got a number"),
        (b'{"sides": [1, null]}', "sides.1", "sides.1: Input should be a valid integer; got null"),
        (b'{"surprise": 1}', "surprise", "surprise: Extra inputs are not permitted"),
        (
            b'{"n": 0, "prompt": 1}',
            "prompt",
            "prompt: Input should be a valid string; got a number (and 1 more)",
        ),
        (b"{", None, "JSON decode error"),
        (b"", None, "Field required"),
        (
            b"[]",
            None,
            "Input should be a valid dictionary or object to extract fields from; got an array of 0",
        ),
    ],
)
def test_what_is_wrong_with_a_body_is_told_in_one_line(body: bytes, param: str | None, message: str) -> None:
    response = _send("POST", "/orders", body)

    error = _error(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"prompt": SECRET * 10}),
        json.dumps({"n": SECRET}),
        json.dumps({"n": [SECRET]}),
        json.dumps({"prompt": {"deeper": SECRET}}),
        json.dumps([SECRET]),
        json.dumps(SECRET),
        json.dumps({"n": 0, "prompt": SECRET}),
        f'{{"prompt": "{SECRET}',
        f'{{"prompt": "{SECRET}", "scale": NaN}}',
    ],
)
def test_a_prompt_does_not_come_back(body: str) -> None:
    response = _send("POST", "/orders", body.encode())

    assert response.status_code == 400
    assert SECRET not in response.text and "nobody" not in response.text


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"x" * 10_000_000: 1}).encode(),
        json.dumps({"n": "9" * 10_000_000}).encode(),
        json.dumps({f"field {i}": i for i in range(10_000)}).encode(),
        b'{"n": ' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"\\ud800": 1}',
        b'{"a\\nb\\u0000": 1}',
        b"\xff\xfe",
        b'{"n": 1e400}',
    ],
)
def test_hostile_bodies_get_a_short_400(body: bytes) -> None:
    response = _send("POST", "/orders", body)

    assert response.status_code == 400 and len(response.content) < 2000
    _error(response)


def test_an_app_that_validates_with_its_limits_is_heard_too() -> None:
    error = _error(_send("POST", "/images", b'{"n": 100}'))
    assert error["message"] == "n 100 is too large; allowed: at most 4"

    error = _error(_send("POST", "/images", b'{"seed": -1}'))
    assert error["message"] == "seed: Input should be greater than or equal to 0; got a number"
    assert (error["param"], error["code"]) == ("seed", "greater_than_equal")

    error = _error(_send("POST", "/images", json.dumps({"scheduler": "x" * 100_000}).encode()))
    assert error["param"] == "scheduler" and len(error["message"]) == 300


def test_paths_and_queries_are_named_like_fields() -> None:
    assert _error(_send("GET", "/orders/first"))["param"] == "number"
    assert _error(_send("GET", "/orders/1?page=x"))["param"] == "page"


def test_what_the_router_says_has_the_form() -> None:
    missing, wrong = _send("GET", "/nowhere"), _send("PUT", "/orders")

    assert (missing.status_code, _error(missing)["type"]) == (404, "not_found_error")
    assert (wrong.status_code, _error(wrong)["type"]) == (405, "invalid_request_error")
    assert wrong.headers["allow"] == "POST"


def test_what_the_app_raises_keeps_its_headers_param_and_code() -> None:
    plain, full, empty = (_send("GET", f"/raise/{what}") for what in ("plain", "full", "empty"))

    assert (plain.status_code, plain.headers["retry-after"]) == (503, "7")
    assert plain.json() == error_body("draining", "server_error")
    assert full.status_code == 404
    assert full.json() == error_body("no model 'x'", "not_found_error", "model", "model_not_found")
    assert (empty.status_code, empty.content) == (304, b"")


def test_half_a_surrogate_pair_can_be_told_back() -> None:
    assert _error(_send("GET", "/raise/half"))["message"] == "no model '\ud800'"


def test_a_mistake_of_ours_tells_nothing_of_itself() -> None:
    response = _send("GET", "/raise/other")

    assert response.status_code == 500
    assert _error(response)["code"] == "internal_error"
    assert "nobody" not in response.text and "RuntimeError" not in response.text
