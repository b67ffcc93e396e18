"""SIGKILL of driver, workers and cluster at random moments: the end is as if nothing had happened."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ldm.storage import filesystem
from pipelines.shards import Sample, write_tar
from tests.faults.conftest import FaultyS3

DRIVER = Path(__file__).with_name("drive_encode.py")
NUM_SHARDS, SAMPLES, UNIT_SIZE = 6, 40, 8
NUM_UNITS = NUM_SHARDS * SAMPLES // UNIT_SIZE
NUM_ENCODERS = 2
# What a process is called, by what it does. Ray titles its workers by their running task.
WORKERS = {
    "encoder": "ray::MapWorker(MapBatches(EmulatedEncoder))",
    "decoder": "_decode_row",
}


@dataclass(frozen=True)
class Corpus:
    """An input, and what an undisturbed run makes of it."""

    source: Path
    expected: dict[str, bytes]


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that a dataset is, apart from who wrote it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "writers")
    # A killed writer leaves a hidden partial file, never one under a final name.
    files = (path for path in files if not path.name.endswith(".partial"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def drive(
    corpus: Path | str, out: Path | str, address: str, *, seconds: float = 0.0, marker: str = ""
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(DRIVER),
        str(corpus),
        str(out),
        address,
        f"{out}.log" if isinstance(out, Path) else "",
        str(seconds),
        marker,
    ]
    environment = {**os.environ, "PYTHONPATH": str(DRIVER.parents[2])}
    return subprocess.Popen(
        command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> list[int]:
    """(units done, units skipped) of a driver that must succeed."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    # Ray logs to the same stream, before and after.
    (line,) = [line for line in out.splitlines() if re.fullmatch(r"\d+ \d+", line)]
    return [int(word) for word in line.split()]


@pytest.fixture(scope="module")
def address(ray_cluster: None) -> str:
    """Of the session's cluster, so that a killed driver costs no cluster."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, photo: Callable[[int], bytes], address: str) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(NUM_SHARDS):
        keys = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        # Every ninth sample is bad, so that quarantine has to survive too.
        images = [b"no image" if key % 9 == 0 else photo(key % 16) for key in keys]
        write_tar(
            folder / f"s{shard}.tar", [Sample(f"{k:04d}", i) for k, i in zip(keys, images, strict=True)]
        )
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert finish(drive(folder, out, address)) == [NUM_UNITS, 0]
    return Corpus(folder, tree(out))


def committed(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> bool:
    """Until the condition holds (True) or the driver has ended (False)."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)
    return True


def worker_of(kind: str) -> psutil.Process | None:
    """A process of the session's cluster that is doing this kind of work."""
    for process in psutil.Process().children(recursive=True):
        try:
            if WORKERS[kind] in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def kill(kind: str, driver: subprocess.Popen[str]) -> bool:
    """SIGKILL one process; False where there is none of its kind now."""
    if kind == "driver":
        driver.kill()
        driver.communicate(timeout=30)
        return True
    victim = worker_of(kind)
    if victim is None:
        return False
    victim.kill()
    return True


def repeats(out: Path, event: str) -> int:
    """How often a unit was ``begun``, or ``encoded`` to its end, again; as the encoders wrote it down."""
    lines = [line.split() for line in Path(f"{out}.log").read_text().splitlines()]
    units = [unit for _, _, what, unit in lines if what == event]
    return len(units) - len(set(units))


def check_repeats(out: Path, kills: Counter[str]) -> str:
    """A kill costs each encoder that it stops one encoded unit at most, and the one it was at."""
    stopped = kills["encoder"] + NUM_ENCODERS * kills["driver"]
    encoded, begun = repeats(out, "encoded"), repeats(out, "begun")
    assert encoded <= stopped
    assert begun <= 2 * stopped
    return f"{dict(kills)} stopped {stopped} encoders; units encoded again: {encoded}, begun again: {begun}"


def run_with_kills(
    corpus: Corpus, out: Path, address: str, kinds: list[str], rng: random.Random
) -> Counter[str]:
    """Drive to the end, killing on the way; returns the kills that hit, by kind."""
    kills: Counter[str] = Counter()
    driver = drive(corpus.source, out, address, seconds=0.02)
    while kinds:
        kind, seen = kinds.pop(), committed(out)
        alive = wait_for(lambda seen=seen: committed(out) > min(seen, NUM_UNITS - 1), driver)
        time.sleep(rng.uniform(0, 0.3))
        if alive:
            kills[kind] += kill(kind, driver)
        if driver.poll() is not None:
            driver.communicate()
            driver = drive(corpus.source, out, address, seconds=0.02)
            if committed(out) == NUM_UNITS:
                break
    finish(driver)
    return kills


def test_killed_at_random_moments_it_ends_as_if_undisturbed(
    corpus: Corpus, address: str, tmp_path: Path
) -> None:
    kinds = ["decoder", "driver", "encoder", "decoder", "encoder", "driver", "encoder", "encoder"]
    kills = run_with_kills(corpus, tmp_path / "out", address, kinds, random.Random(0))
    assert kills.total() >= 5
    assert tree(tmp_path / "out") == corpus.expected
    print(check_repeats(tmp_path / "out", kills))


def test_killed_between_data_and_commit(corpus: Corpus, address: str, tmp_path: Path) -> None:
    out, marker = tmp_path / "out", tmp_path / "marker"
    assert finish(drive(corpus.source, out, address, marker=str(marker))) == [NUM_UNITS, 0]
    assert marker.exists()
    assert tree(out) == corpus.expected


@pytest.mark.faults_long
def test_killed_with_its_whole_cluster(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    driver = drive(corpus.source, out, "local", seconds=0.05)
    assert wait_for(lambda: committed(out) >= 3, driver)
    for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    driver.communicate(timeout=30)
    done = committed(out)
    assert 3 <= done < NUM_UNITS
    assert finish(drive(corpus.source, out, "local")) == [NUM_UNITS - done, done]
    assert tree(out) == corpus.expected


def on_s3(root: str) -> dict[str, bytes]:
    """`tree` of a dataset on S3, read past the fault proxy or through it: reads are retried."""
    store, path = filesystem(root)
    names = [name for name in store.find(path) if "/writers/" not in name]
    return {name[len(path) + 1 :]: store.cat_file(name) for name in names}


@pytest.mark.faults_long
@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_through_a_store_that_fails_the_result_is_exact(
    corpus: Corpus, s3_url: str, faulty_s3: Callable[..., FaultyS3], rate: float
) -> None:
    for shard in corpus.source.glob("*.tar"):
        store, path = filesystem(f"{s3_url}/in/{shard.name}")
        store.pipe_file(path, shard.read_bytes())
    faults, expected = faulty_s3(rate), corpus.expected
    for attempt in range(20):
        out = f"{s3_url}/out{attempt}"
        assert finish(drive(f"{s3_url}/in", out, "local")) == [NUM_UNITS, 0]
        found = on_s3(out)
        # Names of units cover the shard's version, an etag here; what is in the files is the same.
        assert sorted(data for name, data in found.items() if name.startswith("data/")) == sorted(
            data for name, data in expected.items() if name.startswith("data/")
        )
        assert len(found) == len(expected)
        # With a fault in a hundred requests a run may meet none.
        if faults.num_faults():
            break
    print(f"{faults.num_faults()} faults in {attempt + 1} runs")
    assert faults.num_faults() > 0


def test_a_store_that_always_fails_ends_cleanly(
    corpus: Corpus, s3_url: str, faulty_s3: Callable[..., FaultyS3]
) -> None:
    faulty_s3(1.0, kinds=("error_500",))
    process = drive(corpus.source, f"{s3_url}/out", "local")
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "UserError" in err
    faulty_s3(0.0)
    assert on_s3(f"{s3_url}/out") == {}


@pytest.mark.faults_long
@pytest.mark.timeout(7200)
def test_200_kills(corpus: Corpus, address: str, tmp_path: Path) -> None:
    rng, kills, run = random.Random(1), 0, 0
    while kills < 200:
        out = tmp_path / f"out{run}"
        kinds = rng.choices(["driver", "encoder", "decoder"], weights=[1, 3, 2], k=12)
        mine = run_with_kills(corpus, out, address, kinds, rng)
        assert tree(out) == corpus.expected
        kills, run = kills + mine.total(), run + 1
        print(f"{kills} kills in {run} runs; of the last: {check_repeats(out, mine)}", flush=True)
