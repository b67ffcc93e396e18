"""Whole small files, several at once, in their order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ldm import storage
from ldm.errors import BadSampleError

__all__ = ["fetch", "in_order"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# A store answers one request in tens of milliseconds, and many at a time.
NUM_THREADS = 8


def fetch(url: str, limit_bytes: int) -> bytes:
    """The content of a file. BadSampleError ``missing_file`` or ``member_too_large``."""
    filesystem, path = storage.filesystem(url)
    try:
        if filesystem.info(path)["type"] != "file":
            raise BadSampleError("missing_file", f"{url} is no file")
        with filesystem.open(path, "rb", cache_type="none") as stream:
            data: bytes = stream.read(limit_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise BadSampleError("missing_file", f"{url}: {error}") from error
    if len(data) > limit_bytes:
        raise BadSampleError("member_too_large", f"{url}: more than {limit_bytes} bytes")
    return data


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map`` by threads; at most one batch of results is held."""
    remaining = iter(items)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        while batch := list(islice(remaining, NUM_THREADS)):
            yield from pool.map(function, batch)
