"""An HTTP proxy process in front of an S3 server that injects faults into a share of the requests.

    python s3_proxy.py --upstream-port 5000 --rate 0.1 --seed 0 [--kinds error_500,reset_after_write]

Prints its port, and ends when its standard input does. ``GET /-/faults`` answers with the number of
requests and of injected faults of each kind, as JSON; it is never disturbed itself.

    error_500, slow_down    answered without asking the server
    reset_after_write       the server does the request; the client gets a reset instead of the answer
    slow_body               the answer's body trickles, within the time that a client should wait
    timeout                 the server is not asked, and the client gets no answer
    cut_body                headers with the full length, half the body, end of the connection
"""

import argparse
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("error_500", "slow_down", "reset_after_write", "slow_body", "timeout", "cut_body")
COUNTS_PATH = "/-/faults"
TIMEOUT_S = 5.0
SLOW_PIECES, SLOW_PIECE_S = 5, 0.05
HOP_HEADERS = ("connection", "transfer-encoding", "keep-alive", "expect", "content-length", "date", "server")
ERRORS = {"error_500": (500, "InternalError"), "slow_down": (503, "SlowDown")}


class Faults:
    """The draw of the next request's fate, and the count of what was drawn."""

    def __init__(self, rate: float, seed: int, kinds: tuple[str, ...]) -> None:
        self.rate, self.kinds = rate, kinds
        self.random, self.lock, self.counts = random.Random(seed), threading.Lock(), Counter[str]()

    def next(self) -> str | None:
        """A kind of fault, or None for a request that passes."""
        with self.lock:
            is_hit, kind = self.random.random() < self.rate, self.random.choice(self.kinds)
            self.counts.update(["requests", *([kind] if is_hit else [])])
            return kind if is_hit else None


class Proxy(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream_port: int
    faults: Faults

    def handle_one_request(self) -> None:
        """As in the base class, but a client that went away is no news."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        """Any request, whatever its method."""
        if self.path == COUNTS_PATH:
            return self.answer(200, {}, json.dumps(self.faults.counts).encode())
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.faults.next()
        if fault in ERRORS:
            status, code = ERRORS[fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
            return self.answer(status, {"Content-Type": "application/xml"}, text.encode())
        if fault == "timeout":
            time.sleep(TIMEOUT_S)
            return self.reset()
        self.forward(body, fault)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def forward(self, body: bytes, fault: str | None) -> None:
        """Let the server do the request, and hand its answer on, more or less."""
        connection = HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
        try:
            # The client's Host stays: it is part of what was signed.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            content = reply.read()
        finally:
            connection.close()
        if fault in ("reset_after_write", "cut_body") and (fault != "cut_body" or not content):
            return self.reset()
        self.answer(reply.status, _kept(reply), content, fault)

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: str | None = None) -> None:
        """Send an answer; a HEAD's Content-Length is the object's, and so comes with ``headers``."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut_body":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        pieces = SLOW_PIECES if fault == "slow_body" else 1
        step = max(1, -(-len(content) // pieces))
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            time.sleep(SLOW_PIECE_S if fault == "slow_body" else 0)

    def reset(self) -> None:
        """End the connection with a reset: lingering for 0 s makes the kernel send one."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's own output is enough."""


def _kept(reply: HTTPResponse) -> dict[str, str]:
    headers = {k: v for k, v in reply.getheaders() if k.lower() not in HOP_HEADERS}
    length = reply.getheader("Content-Length")
    return headers if length is None else {**headers, "Content-Length": length}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream-port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    given = parser.parse_args()
    Proxy.upstream_port = given.upstream_port
    Proxy.faults = Faults(given.rate, given.seed, tuple(given.kinds.split(",")))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
