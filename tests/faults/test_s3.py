"""S3 through a proxy that injects faults: exact while most requests pass, one clean error when none do."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest

from ldm.errors import UserError
from ldm.s3 import BLOCK_BYTES
from ldm.storage import filesystem
from pipelines.lease import LeaseTiming, writer_lease
from pipelines.publish import create, publish

KINDS = ("error_500", "slow_down", "reset_after_write", "slow_body", "timeout", "cut_body")


class FaultyS3(Protocol):
    """What the fixture ``faulty_s3`` returns."""

    def counts(self) -> dict[str, int]: ...

    def num_faults(self) -> int: ...


def contents(num_files: int) -> dict[str, bytes]:
    """name → bytes; one name that a pattern would read otherwise, one empty file."""
    draw = random.Random(0)
    files = {f"f[{i}]?.bin": draw.randbytes(draw.randrange(10, 20_000)) for i in range(num_files)}
    return files | {"empty": b""}


def round_trip(url: str, files: dict[str, bytes]) -> None:
    """Write, list, and read in every way; every result is compared with what was written."""
    store, root = filesystem(f"{url}/data")
    for name, data in files.items():
        publish(store, f"{root}/{name}", data)
    paths = [f"{root}/{name}" for name in files]
    assert sorted(store.ls(root, detail=False)) == sorted(paths)
    assert {path: info["size"] for path, info in store.find(root, detail=True).items()} == {
        f"{root}/{name}": len(data) for name, data in files.items()
    }
    assert store.cat_ranges(paths, None, None) == [*files.values()]
    for name, data in files.items():
        if data:
            assert store.cat_file(f"{root}/{name}", start=3, end=9) == data[3:9]
        with store.open(f"{root}/{name}", "rb", block_size=4096) as stream:
            assert stream.read() == data
    assert not store.exists(f"{root}/missing")


def test_all_is_well_without_faults(s3_url: str) -> None:
    round_trip(s3_url, contents(5))


@pytest.mark.parametrize(
    ("rate", "num_files"),
    [
        (0.1, 12),
        pytest.param(0.01, 400, marks=pytest.mark.faults_long),
        pytest.param(0.1, 400, marks=pytest.mark.faults_long),
    ],
)
def test_result_is_exact_in_spite_of_faults(
    s3_url: str, faulty_s3: Callable[..., FaultyS3], rate: float, num_files: int
) -> None:
    proxy = faulty_s3(rate, seed=5)
    round_trip(s3_url, contents(num_files))
    counts = proxy.counts()
    assert counts["requests"] > 4 * num_files
    assert proxy.num_faults() > counts["requests"] * rate / 3


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone_is_survived(s3_url: str, faulty_s3: Callable[..., FaultyS3], kind: str) -> None:
    proxy = faulty_s3(0.4, seed=2, kinds=[kind])
    round_trip(s3_url, contents(2 if kind == "timeout" else 5))
    assert proxy.counts()[kind] > 3


@pytest.mark.parametrize("kind", ["", *(kind for kind in KINDS if kind != "slow_body")])
def test_a_store_that_always_fails_ends_in_one_line(
    s3_url: str, faulty_s3: Callable[..., FaultyS3], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "4")
    faulty_s3(1.0, kinds=[kind] if kind else ["error_500", "slow_down", "timeout", "reset_after_write"])
    store, root = filesystem(s3_url)
    started_s = time.monotonic()
    for operation in (lambda: publish(store, f"{root}/x", b"abc"), lambda: store.ls(root)):
        with pytest.raises(UserError, match="attempts are exhausted") as caught:
            operation()
        assert "\n" not in str(caught.value)
        assert root in str(caught.value)
    assert time.monotonic() - started_s < 2 * 4 * (0.5 + 0.4)


def test_nothing_is_half_published(
    s3_url: str, s3_port: int, faulty_s3: Callable[..., FaultyS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "3")
    data = random.Random(0).randbytes(300_000)
    faulty_s3(1.0, kinds=["reset_after_write", "error_500", "timeout"])
    store, root = filesystem(s3_url)
    for i in range(6):
        with suppress(UserError):
            publish(store, f"{root}/{i}", data)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    type(store).clear_instance_cache()
    store, root = filesystem(s3_url)
    # A PUT whose answer was lost is there whole; no other one is there at all.
    published = store.ls(root, detail=False)
    assert published
    assert all(store.cat_file(path) == data for path in published)


def test_large_file_is_read_in_blocks(
    s3_url: str, faulty_s3: Callable[..., FaultyS3], tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(2 * BLOCK_BYTES + 5)
    store, root = filesystem(s3_url)
    publish(store, f"{root}/large", data)
    faulty_s3(0.3, seed=3, kinds=["cut_body", "reset_after_write", "slow_down"])
    store, root = filesystem(s3_url)
    store.get_file(f"{root}/large", str(tmp_path / "large"))
    assert (tmp_path / "large").read_bytes() == data
    with store.open(f"{root}/large", "rb") as stream:
        assert b"".join(iter(lambda: stream.read(3_000_000), b"")) == data


def test_create_knows_its_own_write(s3_url: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    proxy = faulty_s3(0.5, seed=4, kinds=["reset_after_write"])
    store, root = filesystem(s3_url)
    for i in range(10):
        # The same bytes twice: only the writer's mark tells whose they are.
        assert create(store, f"{root}/{i}", b"same") is True
        assert create(store, f"{root}/{i}", b"same") is False
    assert proxy.counts()["reset_after_write"] > 5


def test_mistakes_are_told_in_one_line(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filesystem(s3_url)
    with pytest.raises(UserError, match="no such bucket: s3://no-such-bucket"):
        publish(store, "no-such-bucket/x", b"")
    with pytest.raises(UserError, match="no such bucket: s3://no-such-bucket"):
        store.ls("no-such-bucket/folder")
    with pytest.raises(FileNotFoundError):
        store.cat_file(f"{s3_url}/missing")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    type(store).clear_instance_cache()
    with pytest.raises(UserError, match="AWS_PROFILE"):
        filesystem(s3_url)[0].ls(s3_url)
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "many")
    with pytest.raises(UserError, match="LDM_S3_ATTEMPTS"):
        filesystem(s3_url)


@pytest.mark.parametrize(
    ("endpoint", "said"), [("http://127.0.0.1:9", "attempts are exhausted"), ("nonsense", "endpoint")]
)
def test_wrong_endpoint_is_told_in_one_line(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, endpoint: str, said: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "2")
    store, root = filesystem(s3_url)
    type(store).clear_instance_cache()
    store, root = filesystem(s3_url)
    with pytest.raises(UserError, match=said):
        store.ls(root)


def test_one_of_many_holds_the_lease(s3_url: str) -> None:
    store, root = filesystem(s3_url)
    timing = LeaseTiming(renew_s=0.1, expire_s=1.0)

    def enter(_: int) -> object:
        lease = writer_lease(store, root, "d", timing)
        try:
            return lease, lease.__enter__()
        except UserError as error:
            return str(error)

    for _ in range(4):
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(enter, range(8))]
        ((context, lease),) = [answer for answer in answers if isinstance(answer, tuple)]
        assert all("d is being written by process" in str(a) for a in answers if a != (context, lease))
        lease.check()
        context.__exit__(None, None, None)
    assert len(store.ls(f"{root}/writers")) == 1


def test_silent_lease_on_s3_expires_and_its_loser_is_told(s3_url: str) -> None:
    store, root = filesystem(s3_url)
    timing = LeaseTiming(renew_s=0.1, expire_s=0.5)
    with (  # noqa: PT012
        pytest.raises(UserError, match="lost the right"),
        writer_lease(store, root, "d", LeaseTiming(renew_s=30, expire_s=60)) as silent,
    ):
        (path,) = store.ls(f"{root}/writers", detail=False)
        far = json.loads(store.cat_file(path))
        far["process"]["space"] = "another machine"
        publish(store, path, json.dumps(far).encode())
        with writer_lease(store, root, "d", timing):
            silent._renew()
