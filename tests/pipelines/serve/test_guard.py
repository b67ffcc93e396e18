import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serve.drain import Drain
from pipelines.serve.guard import AccessConfig, Guard
from pipelines.serve.keys import KeyEntry, KeyRing, new_key

WORK = "/v1/images/generations"
MEBIBYTE = 2**20
ALICE, ALICE_LINE = new_key("alice")
BOB, BOB_LINE = new_key("bob")
KEYS = KeyRing([KeyEntry.model_validate_json(line) for line in (ALICE_LINE, BOB_LINE)])
OPEN = KeyRing()


class Echo:
    """Answers who asked and how long the body was; remembers the bodies."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.bodies.append(await request.body())
        answer = {"principal": request.state.principal, "bytes": len(self.bodies[-1])}
        await JSONResponse(answer)(scope, receive, send)


def _guard(
    app: ASGIApp, keys: KeyRing = OPEN, clock: Callable[[], float] | None = None, **limits: Any
) -> Guard:
    return Guard(app, AccessConfig(**limits), keys, clock=clock or (lambda: 0.0))


def _run(app: ASGIApp, scenario: Callable[[httpx.AsyncClient], Awaitable[None]], root_path: str = "") -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await asyncio.wait_for(scenario(client), 60)

    asyncio.run(run())


def _send(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    responses: list[httpx.Response] = []

    async def scenario(client: httpx.AsyncClient) -> None:
        responses.append(await client.request(method, path, **options))

    _run(app, scenario)
    return responses[0]


def _call(app: ASGIApp, receive: Receive, headers: list[tuple[bytes, bytes]] = []) -> list[Message]:  # noqa: B006
    """What the app sends for a POST whose body ``receive`` gives."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": WORK, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _code(response: httpx.Response) -> str:
    code: str = response.json()["error"]["code"]
    return code


def test_a_key_gives_its_name_to_the_app() -> None:
    response = _send(_guard(Echo(), KEYS), "POST", WORK, headers=_bearer(BOB), content=b"{}")

    assert response.json() == {"principal": "bob", "bytes": 2}


def test_an_open_server_takes_everybody_and_any_key() -> None:
    for headers in ({}, _bearer(BOB), {"authorization": "Basic !!!"}):
        response = _send(_guard(Echo(), OPEN), "POST", WORK, headers=headers, content=b"{}")
        assert response.json() == {"principal": "anonymous", "bytes": 2}


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([], "missing_api_key"),
        ([b""], "missing_api_key"),
        ([b"Bearer"], "missing_api_key"),
        ([b"Bearer  "], "missing_api_key"),
        ([BOB.encode()], "missing_api_key"),
        ([b"Basic !!!no base64"], "missing_api_key"),
        ([b"Basic " + BOB.encode()], "missing_api_key"),
        ([b"Bearer " + BOB.encode()[:-1]], "invalid_api_key"),
        ([b"Bearer " + BOB.encode() + b"x"], "invalid_api_key"),
        ([b"Bearer \xff\xfe\xe9"], "invalid_api_key"),
        ([b"Bearer " + b"x" * 60_000], "invalid_api_key"),
        ([b"Bearer " + BOB.encode()] * 2, "missing_api_key"),
        ([b"Bearer wrong", b"Bearer " + BOB.encode()], "missing_api_key"),
    ],
)
def test_without_exactly_one_right_key_nothing_reaches_the_app(values: list[bytes], code: str) -> None:
    app = Echo()
    headers = [(b"authorization", value) for value in values]

    response = _send(_guard(app, KEYS), "POST", WORK, headers=headers, content=b"{}")

    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["type"] == "authentication_error" and _code(response) == code
    assert BOB[:-1] not in response.text and app.bodies == []


def test_the_scheme_is_told_in_any_case() -> None:
    for scheme in ("bearer", "BEARER"):
        response = _send(
            _guard(Echo(), KEYS), "GET", "/v1/models", headers={"authorization": f"{scheme} {BOB}"}
        )
        assert response.json()["principal"] == "bob"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/page/app.js", 200),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/page", 401),
        ("/pages/x", 401),
        ("/healthz/x", 401),
        ("/metrics", 401),
        ("/v1/models", 401),
        ("/docs", 401),
        ("//page/app.js", 401),
        ("/v1/models?x=/page/", 401),
        ("/v1%2Fmodels", 401),
        ("/PAGE/app.js", 401),
    ],
)
def test_only_the_page_and_the_probes_are_open(path: str, status: int) -> None:
    assert _send(_guard(Echo(), KEYS), "GET", path).status_code == status


def test_metrics_are_open_where_that_is_asked_for() -> None:
    assert _send(_guard(Echo(), KEYS, open_metrics=True), "GET", "/metrics").status_code == 200


def test_wrong_keys_leave_no_trace() -> None:
    guard = _guard(Echo(), KEYS)

    async def scenario(client: httpx.AsyncClient) -> None:
        for number in range(500):
            response = await client.post(WORK, headers=_bearer(f"ldm-{number}"), content=b"{}")
            assert response.status_code == 401

    _run(guard, scenario)
    assert guard.rates.active == {"alice": 0, "bob": 0}


def test_a_key_over_its_rate_is_told_when_to_come_back() -> None:
    now_s = [0.0]
    entries = [KEYS.entries[0].model_copy(update={"requests_per_minute": 2}), KEYS.entries[1]]
    guard = _guard(Echo(), KeyRing(entries), clock=lambda: now_s[0], requests_per_minute=100)

    async def scenario(client: httpx.AsyncClient) -> None:
        async def ask(key: str, method: str = "POST", path: str = WORK) -> httpx.Response:
            return await client.request(method, path, headers=_bearer(key))

        assert [(await ask(ALICE)).status_code for _ in range(2)] == [200, 200]
        refused = await ask(ALICE)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert _code(refused) == "rate_limit_exceeded"
        # Nobody else, and nothing but work, is held up.
        assert (await ask(BOB)).status_code == 200
        assert (await ask(ALICE, "GET", "/v1/models")).status_code == 200
        now_s[0] = 29.9
        assert (await ask(ALICE)).headers["retry-after"] == "1"
        now_s[0] = 30.0
        assert (await ask(ALICE)).status_code == 200

    _run(guard, scenario)


def test_a_mounted_server_counts_as_well() -> None:
    guard = _guard(Echo(), OPEN, requests_per_minute=1)

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.post("/ldm" + WORK)).status_code == 200
        assert (await client.post("/ldm" + WORK)).status_code == 429

    _run(guard, scenario, root_path="/ldm")


def test_a_key_has_so_many_requests_at_once_until_the_answer_is_whole() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            begun.set()
            await go_on.wait()
            yield b"last"

        await StreamingResponse(body())(scope, receive, send)

    guard = _guard(slow, KEYS, max_concurrent=1)

    async def scenario(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post(WORK, headers=_bearer(ALICE)))
        await begun.wait()
        refused = await client.post(WORK, headers=_bearer(ALICE))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert _code(refused) == "concurrency_limit_exceeded"
        go_on.set()
        assert (await first).content == b"firstlast"
        assert (await client.post(WORK, headers=_bearer(ALICE))).status_code == 200

    _run(guard, scenario)
    assert guard.rates.active == {"alice": 0, "bob": 0}


def test_an_end_lets_no_work_in_and_waits_for_what_is_on_its_way() -> None:
    ended, drain = asyncio.Event(), Drain()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await ended.wait()
        await Echo()(scope, receive, send)

    async def scenario(client: httpx.AsyncClient) -> None:
        waiting = asyncio.create_task(client.post(WORK))
        while not drain.on_its_way:
            await asyncio.sleep(0)
        assert drain.begin() == 1
        late = await client.post(WORK)
        assert (late.status_code, _code(late), late.headers["retry-after"]) == (503, "restarting", "1")
        assert drain.begin() == 1
        ended.set()
        assert (await waiting).status_code == 200
        assert drain.begin() == 0
        assert (await client.get("/healthz")).status_code == 200

    _run(Guard(app, AccessConfig(), OPEN, drain=drain), scenario)


def test_an_app_that_fails_gives_its_slot_back() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    guard = _guard(failing, OPEN, max_concurrent=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            _send(guard, "POST", WORK)
    assert guard.rates.active == {"anonymous": 0}


@pytest.mark.parametrize("length", [b"1025", b"9" * 19, b"9" * 5000])
def test_a_body_that_is_declared_too_large_is_not_read(length: bytes) -> None:
    async def unread() -> Message:
        raise AssertionError("read")

    guard = _guard(Echo(), OPEN, max_body_bytes=1024, requests_per_minute=1)
    for _ in range(2):  # and costs nothing of the rate
        start, _ = _call(guard, unread, [(b"content-length", length)])
        assert start["status"] == 413


@pytest.mark.parametrize("length", [None, b"5", b"-1", b"1e3", "٥".encode(), b"\xb2", b"0" * 25, b""])
def test_bytes_are_counted_whatever_is_declared(length: bytes | None) -> None:
    app, read = Echo(), [0]

    async def gibibyte() -> Message:
        read[0] += 2**16
        return {"type": "http.request", "body": b"x" * 2**16, "more_body": read[0] < 2**30}

    headers = [] if length is None else [(b"content-length", length)]
    start, body = _call(_guard(app, OPEN, max_body_bytes=MEBIBYTE), gibibyte, headers)

    assert (start["status"], dict(start["headers"])[b"connection"]) == (413, b"close")
    assert b'"code": "body_too_large"' in body["body"]
    assert read == [MEBIBYTE + 2**16] and app.bodies == []


def test_a_body_of_just_the_size_arrives_whole_in_whatever_pieces() -> None:
    app = Echo()
    content = bytes(range(256)) * 4
    pieces: list[Message] = [
        {"type": "http.request", "body": bytes([byte]), "more_body": True} for byte in content
    ]
    pieces += [{"type": "http.request", "more_body": True}, {"type": "http.request"}]

    async def piecewise() -> Message:
        return pieces.pop(0)

    assert _call(_guard(app, OPEN, max_body_bytes=1024), piecewise)[0]["status"] == 200
    assert app.bodies == [content]


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/"), ("PUT", WORK)])
def test_only_what_is_counted_may_have_a_body(method: str, path: str) -> None:
    app = Echo()
    assert _send(_guard(app), method, path, content=b"x").status_code == 413
    assert _send(_guard(app), method, path, content=b"").status_code == 200
    assert app.bodies == [b""]


def test_a_websocket_is_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    asyncio.run(_guard(Echo())({"type": "websocket", "path": WORK}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_other_sites_get_in_by_cors_around_it_and_only_those_that_are_listed() -> None:
    config = AccessConfig(allowed_origins=("https://a.example",))
    app = CORSMiddleware(
        Guard(Echo(), config, KEYS),
        allow_origins=config.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization"],
        expose_headers=["x-request-id", "Retry-After"],
    )
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }

    allowed = _send(app, "OPTIONS", WORK, headers={"origin": "https://a.example", **asks})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
    refused = _send(app, "OPTIONS", WORK, headers={"origin": "https://b.example", **asks})
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    keyless = _send(app, "POST", WORK, headers={"origin": "https://a.example"})
    assert keyless.status_code == 401 and "x-request-id" in keyless.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in _send(_guard(Echo()), "GET", "/", headers=asks).headers


# From here on through real sockets.


@contextmanager
def _serving(app: ASGIApp, http: str) -> Iterator[Callable[[], socket.socket]]:
    """Makes connections to the app; at the end every request has ended."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()
    server = uvicorn.Server(uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield lambda: socket.create_connection(address, timeout=60)
    finally:
        server.should_exit = True
        thread.join()


def _head(*headers: str, method: str = "POST", path: str = WORK) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: server", *headers, "", ""]).encode("latin-1")


def _one(connection: socket.socket) -> bytes:
    """An answer of a connection that stays open."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(2**16)
    head, _, body = answer.partition(b"\r\n\r\n")
    (length,) = [
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line
    ]
    while len(body) < length:
        body += connection.recv(2**16)
    return head + body


def _rest(connection: socket.socket) -> bytes:
    """All until the server closes."""
    received = b""
    while piece := connection.recv(2**16):
        received += piece
    return received


def _mebibytes_taken(connection: socket.socket) -> int:
    """Of a GiB, as chunks of a MiB, until the server has closed."""
    chunk = b"100000\r\n" + bytes(MEBIBYTE) + b"\r\n"
    for sent in range(1024):
        try:
            connection.sendall(chunk)
        except ConnectionError:
            return sent
    return 1024


HTTP = pytest.mark.parametrize("http", ["h11", "httptools"])


@HTTP
def test_an_endless_body_is_cut_off(http: str) -> None:
    app = Echo()
    with _serving(_guard(app, max_body_bytes=MEBIBYTE), http) as connect, connect() as connection:
        connection.sendall(_head("Transfer-Encoding: chunked"))
        sent = _mebibytes_taken(connection)
        answer = connection.recv(2**16)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent < 64  # of 1024; the sockets' buffers hold some
    assert app.bodies == []


@HTTP
def test_a_body_that_does_not_come_is_not_waited_for(http: str) -> None:
    app = Echo()
    guard = _guard(app, body_timeout_s=0.2)
    with _serving(guard, http) as connect, connect() as connection:
        connection.sendall(_head("Content-Length: 100") + b"only this")
        answer = _rest(connection)

    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "body_timeout"' in answer
    assert app.bodies == [] and guard.rates.active == {"anonymous": 0}


@HTTP
def test_a_client_that_leaves_before_its_body_is_whole_never_was(http: str) -> None:
    app = Echo()
    guard = _guard(app)
    with _serving(guard, http) as connect:
        with connect() as connection:
            connection.sendall(_head("Content-Length: 100") + b"only this")
        with connect() as connection:
            connection.sendall(_head("Connection: close", "Content-Length: 2") + b"{}")
            assert _rest(connection).startswith(b"HTTP/1.1 200 ")

    assert app.bodies == [b"{}"] and guard.rates.active == {"anonymous": 0}


@HTTP
def test_who_waits_to_send_is_refused_before_sending(http: str) -> None:
    with _serving(_guard(Echo(), max_body_bytes=10), http) as connect, connect() as connection:
        connection.sendall(_head("Expect: 100-continue", "Content-Length: 1000000"))
        assert _rest(connection).startswith(b"HTTP/1.1 413 ")


@HTTP
def test_a_refusal_of_a_short_body_keeps_the_connection(http: str) -> None:
    with _serving(_guard(Echo(), KEYS), http) as connect, connect() as connection:
        connection.sendall(_head("Content-Length: 5", "Authorization: Bearer \xff"))
        refused = _one(connection)
        connection.sendall(
            b"12345" + _head("Content-Length: 0", f"Authorization: Bearer {BOB}", "Connection: close")
        )
        accepted = _rest(connection)

    assert refused.startswith(b"HTTP/1.1 401 ") and accepted.startswith(b"HTTP/1.1 200 ")
    assert accepted.endswith(b'{"principal":"bob","bytes":0}')


@HTTP
def test_answers_pass_piece_by_piece(http: str) -> None:
    seen = threading.Event()

    async def in_two(scope: Scope, receive: Receive, send: Send) -> None:
        async def body() -> AsyncIterator[str]:
            yield "event: first\n\n"
            assert await asyncio.to_thread(seen.wait, 60)
            yield "event: second\n\n"

        await StreamingResponse(body(), media_type="text/event-stream")(scope, receive, send)

    with _serving(_guard(in_two), http) as connect, connect() as connection:
        connection.sendall(_head("Content-Length: 2", "Connection: close") + b"{}")
        received = b""
        while b"event: first\n\n" not in received:
            received += connection.recv(2**16)
        seen.set()
        assert b"event: second\n\n" in _rest(connection)


@HTTP
def test_the_app_hears_that_its_client_has_left(http: str) -> None:
    heard: list[str] = []
    left = threading.Event()

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append((await receive())["body"].decode())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        heard.append((await receive())["type"])
        left.set()

    guard = _guard(streaming)
    with _serving(guard, http) as connect:
        with connect() as connection:
            connection.sendall(_head("Content-Length: 6") + b"prompt")
            received = b""
            while b"begun" not in received:
                received += connection.recv(2**16)
        assert left.wait(60)

    assert heard == ["prompt", "http.disconnect"]
    assert guard.rates.active == {"anonymous": 0}


@HTTP
def test_what_comes_after_a_length_that_is_too_short_is_not_of_the_body(http: str) -> None:
    app = Echo()
    with _serving(_guard(app), http) as connect, connect() as connection:
        connection.sendall(_head("Content-Length: 5") + b"12345" + b"not a request\r\n\r\n")
        _rest(connection)

    # With httptools the connection may end before the first request is looked at.
    assert app.bodies in ([], [b"12345"])
