import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.serve.api_errors import install
from pipelines.serve.guard import AccessConfig, Guard
from pipelines.serve.keys import KeyRing, new_key
from pipelines.serve.request_id import Identified, RequestIdFilter, request_id

NEW = re.compile("[0-9a-f]{32}")


def _app() -> FastAPI:
    app = FastAPI()
    install(app)

    @app.get("/id")
    def read_id(request: Request) -> list[str]:
        logging.getLogger("ldm.serve.app").warning("at work")
        return [request_id.get(), request.state.request_id]

    @app.get("/fail")
    async def fail() -> None:
        raise RuntimeError("what only the log may tell")

    return app


def _get(app: ASGIApp, path: str, **options: Any) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, **options)

    return asyncio.run(get())


def test_a_sane_id_of_the_client_is_kept_everywhere() -> None:
    response = _get(Identified(_app()), "/id", headers={"x-request-id": "trace-1.2_3"})

    assert response.json() == ["trace-1.2_3"] * 2
    assert response.headers.get_list("x-request-id") == ["trace-1.2_3"]


@pytest.mark.parametrize("proposed", [b"", b"a b", b"x" * 65, b"\xe9", b"a;b", b"trace\t1", b"<script>"])
def test_any_other_is_replaced(proposed: bytes) -> None:
    response = _get(Identified(_app()), "/id", headers=[(b"x-request-id", proposed)])

    assert NEW.fullmatch(response.headers["x-request-id"])
    assert response.json() == [response.headers["x-request-id"]] * 2


def test_the_id_ends_with_its_request() -> None:
    async def empty(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> list[str]:
        transport = httpx.ASGITransport(Identified(empty))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            before = request_id.get()
            await client.get("/")
        return [before, request_id.get()]

    assert asyncio.run(run()) == ["-", "-"]


def test_ids_are_new_each_time() -> None:
    app = Identified(_app())

    assert len({_get(app, "/id").headers["x-request-id"] for _ in range(20)}) == 20


def test_every_answer_has_an_id_once_and_the_headers_for_browsers() -> None:
    app = Guard(_app(), AccessConfig(), KeyRing())
    locked = Guard(_app(), AccessConfig(), KeyRing.load(None, {"LDM_API_KEYS": f"a:{new_key('a')[0]}"}))

    responses = [_get(app, "/id"), _get(app, "/none"), _get(app, "/fail"), _get(locked, "/id")]

    assert [response.status_code for response in responses] == [200, 404, 500, 401]
    for response in responses:
        assert len(response.headers.get_list("x-request-id")) == 1
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' blob: data:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }


def test_an_app_cannot_weaken_them() -> None:
    async def lax(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"x-request-id", b"other"), (b"Content-Security-Policy".lower(), b"default-src *")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    response = _get(Identified(lax), "/", headers={"x-request-id": "mine"})

    assert response.headers.get_list("x-request-id") == ["mine"]
    assert "*" not in response.headers["content-security-policy"]


def test_a_failure_is_logged_with_the_id_that_the_client_gets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(RequestIdFilter())

    response = _get(Identified(_app()), "/fail", headers={"x-request-id": "r1"})

    assert response.status_code == 500 and "r1" in response.json()["error"]["message"]
    assert "only the log" not in response.text
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.request_id for record in failures] == ["r1"]  # type: ignore[attr-defined]
    assert "only the log" in caplog.text


def test_a_failure_outside_of_any_framework_is_answered_too() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError

    response = _get(Identified(broken), "/", headers={"x-request-id": "r2"})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error" and "r2" in response.text


def test_a_failure_after_the_answer_began_starts_no_other() -> None:
    started: list[str] = []

    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError

    async def send(message: Any) -> None:
        started.append(message["type"])

    async def run() -> None:
        with pytest.raises(RuntimeError):
            await Identified(half)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert started == ["http.response.start"]


def test_records_have_the_id_of_their_request_and_a_dash_outside(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(RequestIdFilter())

    _get(Identified(_app()), "/id", headers={"x-request-id": "r3"})
    logging.getLogger("ldm").warning("outside")

    ids = {record.getMessage(): record.request_id for record in caplog.records}  # type: ignore[attr-defined]
    assert (ids["at work"], ids["outside"]) == ("r3", "-")


def test_a_request_is_one_line_in_the_log_without_secrets(caplog: pytest.LogCaptureFixture) -> None:
    key, _ = new_key("a")
    guard = Guard(_app(), AccessConfig(), KeyRing.load(None, {"LDM_API_KEYS": f"alice:{key}"}))
    caplog.set_level(logging.INFO, "ldm.serve")
    headers = {"x-request-id": "r4", "authorization": f"Bearer {key}"}

    _get(guard, "/id?prompt=secret", headers=headers)
    _get(guard, "/none%0AGET /forged 200", headers={"x-request-id": "r5"})

    lines = [record.getMessage() for record in caplog.records if record.name == "ldm.serve"]
    assert len(lines) == 2
    assert re.fullmatch(r"GET /id 200 \d+\.\d ms principal=alice request_id=r4", lines[0])
    assert re.fullmatch(r"GET /none%0AGET%20/forged%20200 401 \d+\.\d ms principal=- request_id=r5", lines[1])
    assert key not in caplog.text and "secret" not in caplog.text
