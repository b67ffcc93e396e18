"""A real S3 server process, and a proxy process in front of it that injects faults."""

import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class FaultyS3:
    """A running fault proxy; AWS_ENDPOINT_URL points at it for the rest of the test."""

    endpoint: str

    def counts(self) -> dict[str, int]:
        """``requests``, and injected faults by kind, so far."""
        with urllib.request.urlopen(f"{self.endpoint}/-/faults", timeout=10) as reply:
            counts: dict[str, int] = json.load(reply)
            return counts

    def num_faults(self) -> int:
        """Injected faults of all kinds, so far."""
        return sum(count for kind, count in self.counts().items() if kind != "requests")


@contextmanager
def _running(*command: str) -> Iterator[int]:
    """A server of this folder; yields the port that it prints."""
    arguments = [sys.executable, str(HERE / command[0]), *command[1:]]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server process on the loopback."""
    with _running("s3_server.py") as port:
        yield port


@pytest.fixture
def s3_url(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://<a new bucket>``; the environment has the endpoint, credentials and short waits."""
    from ldm.s3 import S3Storage

    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "LDM_S3_FIRST_WAIT_S": "0.05",
        "LDM_S3_LONGEST_WAIT_S": "0.2",
        "LDM_S3_READ_TIMEOUT_S": "0.5",
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # A cached file system has read the environment of an earlier test.
    S3Storage.clear_instance_cache()
    bucket = f"b-{uuid.uuid4().hex}"
    request = urllib.request.Request(f"{environment['AWS_ENDPOINT_URL']}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    return f"s3://{bucket}"


@pytest.fixture
def faulty_s3(
    s3_port: int, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FaultyS3]]:
    """``faulty_s3(rate, seed=0, kinds=())`` puts a fault proxy before the server, for child processes too.

    kinds: of those that s3_proxy.py lists; default all. `s3_url` stays the URL to use.
    """
    from contextlib import ExitStack

    from ldm.s3 import S3Storage

    with ExitStack() as running:

        def start(rate: float, seed: int = 0, kinds: Sequence[str] = ()) -> FaultyS3:
            options = [f"--upstream-port={s3_port}", f"--rate={rate}", f"--seed={seed}"]
            options += [f"--kinds={','.join(kinds)}"] if kinds else []
            port = running.enter_context(_running("s3_proxy.py", *options))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            S3Storage.clear_instance_cache()
            return FaultyS3(f"http://127.0.0.1:{port}")

        yield start
    S3Storage.clear_instance_cache()
