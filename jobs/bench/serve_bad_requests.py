"""How soon a server says no to what it can never do: over HTTP, with keys, before any model works for it."""

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from jobs.bench.serve_load import quantile
from jobs.bench.serve_model import bench_server
from ldm.images import encode_png
from pipelines.serve.config import SamplerPool, StagePool
from pipelines.serve.guard import AccessConfig
from pipelines.serve.keys import new_key

__all__ = ["bad_requests"]

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ALLOWED = {400, 401, 413, 422}
BOMB_SIDE_PX = 20_000
HUGE_BYTES = 2**30
TIMEOUT_S = 30.0


def bad_requests(preset: str, side: int, rounds: int) -> dict[str, float]:
    """Milliseconds until the refusal: of each kind the median, and of all together the worst and the p99.

    ``wrong``: other answers than 400, 401, 413 and 422. Needs a connected Ray.
    """
    key, entry = new_key("bench")
    with TemporaryDirectory() as folder:
        key_file = Path(folder) / "keys"
        key_file.touch(mode=0o600)
        key_file.write_text(entry + "\n")
        access = AccessConfig(key_file=key_file, requests_per_minute=10**6)
        with bench_server(preset, side, SamplerPool(threads=1), StagePool(threads=1), access) as url:
            return asyncio.run(_measured(url, key, rounds))


async def _measured(url: str, key: str, rounds: int) -> dict[str, float]:
    authorised = {"Authorization": f"Bearer {key}"}
    milliseconds: dict[str, list[float]] = {}
    wrong = 0
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        kinds: dict[str, Callable[[], Awaitable[int]]] = {
            name: _sender(http, request) for name, request in _requests(authorised).items()
        }
        kinds["body of 1 GB"] = lambda: _announce(url, authorised)
        for _ in range(rounds):
            for name, send in kinds.items():
                start = time.perf_counter()
                status = await send()
                milliseconds.setdefault(name, []).append(1000 * (time.perf_counter() - start))
                wrong += status not in ALLOWED
        alive = await http.post(GENERATIONS, json={"num_inference_steps": 2}, headers=authorised)
    medians = {name: median(found) for name, found in milliseconds.items()}
    everything = [each for found in milliseconds.values() for each in found]
    return {
        **{f"bad_{name.replace(' ', '_')}_ms": found for name, found in medians.items()},
        "bad_request_ms": max(medians.values()),
        "bad_request_p99_ms": quantile(everything, 0.99),
        "bad_request_wrong": float(wrong),
        "bad_request_alive": float(alive.status_code == 200),
    }


def _requests(authorised: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By kind: arguments of a POST."""
    values: dict[str, object] = {
        "size": {"size": "100000x10000"},
        "steps": {"num_inference_steps": 10**9},
        "seed": {"seed": 2**70},
        "n": {"n": 10**6},
        "guidance": {"guidance_scale": float("nan")},
        "nesting": None,
    }
    bodies = {name: json.dumps(value) for name, value in values.items()} | {"nesting": "[" * 10**5}
    made = {
        name: {"url": GENERATIONS, "content": body, "headers": dict(authorised)}
        for name, body in bodies.items()
    }
    for name, headers in {"no key": {}, "wrong key": {"Authorization": "Bearer " + "x" * 43}}.items():
        made[name] = {"url": GENERATIONS, "content": "{}", "headers": headers}
    image, mask = (encode_png(np.zeros((side, side, 3), np.uint8)) for side in (64, 8))
    for name, files in {
        "bomb": {"image": ("bomb.png", _bomb())},
        "no image": {"image": ("image.png", b"not an image")},
        "mask": {"image": ("image.png", image), "mask": ("mask.png", mask)},
    }.items():
        made[name] = {"url": EDITS, "files": files, "data": {"prompt": ""}, "headers": dict(authorised)}
    return made


def _bomb() -> bytes:
    """A small file of very many pixels."""
    file = io.BytesIO()
    Image.new("1", (BOMB_SIDE_PX, BOMB_SIDE_PX)).save(file, "PNG")
    return file.getvalue()


def _sender(http: httpx.AsyncClient, request: dict[str, Any]) -> Callable[[], Awaitable[int]]:
    async def send() -> int:
        return (await http.post(**request)).status_code

    return send


async def _announce(url: str, headers: Mapping[str, str]) -> int:
    """The status after the head of a huge request, of whose body nothing is sent."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    lines = [f"POST {GENERATIONS} HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {HUGE_BYTES}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        await writer.wait_closed()
