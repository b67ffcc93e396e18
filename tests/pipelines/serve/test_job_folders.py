"""Who ends a job, and what is read of it after processes raced, were killed, or a disk lost something."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from pipelines.serve.job_store import JobFinished, JobRecord, JobStore
from tests.faults.conftest import s3_port, s3_url
from tests.pipelines.serve.test_job_store import (
    Clock,
    clock,
    local,
    new_job,
    store,
    url,
)

# Fixtures.
__all__ = ["clock", "local", "s3_port", "s3_url", "store", "url"]

ROOT = Path(__file__).resolve().parents[3]

ENDS = """
import sys
from pipelines.serve.job_store import JobFinished, JobStore
store = JobStore(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    job_id, status = line.split()
    try:
        store.update(store.read(job_id, "ann").revised(status=status))
        print("won", flush=True)
    except JobFinished:
        print("lost", flush=True)
"""

COUNTS_UP = """
import sys
from pipelines.serve.job_store import JobStore
store = JobStore(sys.argv[1])
(record,) = store.unfinished()
while True:
    record = store.update(record.revised(attempts=record.attempts + 1))
    print(record.attempts, flush=True)
"""

MAKES_AND_ENDS = """
import sys
from pipelines.serve.job_store import JobStore
store = JobStore(sys.argv[1])
while True:
    record = store.create({}, "ann", 0, 50)
    record = store.update(record.revised(status="running"))
    store.update(record.revised(status="completed"))
    print(record.id, flush=True)
"""


@contextmanager
def process(program: str, url: str) -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, "-c", program, url], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def line_of(racer: subprocess.Popen[str]) -> str:
    assert racer.stdout is not None
    return racer.stdout.readline().strip()


def lines_until_killed(program: str, url: str, num_lines: int) -> list[str]:
    """What it printed before it was killed, in the middle of what comes after so many lines."""
    with process(program, url) as victim:
        seen = [line_of(victim) for _ in range(num_lines)]
        victim.kill()
        assert victim.stdout is not None
        return seen + victim.stdout.read().split()


@pytest.mark.parametrize("late", ["running", "failed", "completed"])
def test_a_runner_that_had_looked_before_the_other_ended_it(store: JobStore, url: str, late: str) -> None:
    record = new_job(store)

    def other_ends_it() -> float:
        """The loser asks for the time when it has found the job unfinished."""
        ended.append(store.update(record.revised(status="cancelled")))
        return 2000.0

    ended: list[JobRecord] = []
    loser = JobStore(url, clock=other_ends_it)
    if late == "running":
        loser.update(record.revised(status=late))
    else:
        with pytest.raises(JobFinished):
            loser.update(record.revised(status=late))

    assert JobStore(url, clock=lambda: 1000.0).list("ann") == ended


def test_one_of_two_processes_ends_a_job(url: str) -> None:
    store = JobStore(url)
    with ExitStack() as ending:
        racers = [ending.enter_context(process(ENDS, url)) for _ in range(2)]
        assert [line_of(racer) for racer in racers] == ["ready", "ready"]
        for _ in range(20):
            record = new_job(store)
            for racer, status in zip(racers, ("completed", "failed"), strict=True):
                assert racer.stdin is not None
                racer.stdin.write(f"{record.id} {status}\n")
                racer.stdin.flush()
            answers = [line_of(racer) for racer in racers]
            assert sorted(answers) == ["lost", "won"]
            winner = ("completed", "failed")[answers.index("won")]
            assert store.read(record.id, "ann").status == winner


def test_killed_while_it_writes_how_far_it_is(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path))
    # Large, so that most of the time is spent on writing.
    record = store.create({"prompt": "a" * 2_000_000}, "ann", 0, 50)
    draw = Random(0)
    for _ in range(6):
        printed = lines_until_killed(COUNTS_UP, str(tmp_path), num_lines=draw.randrange(2, 12))
        read = store.read(record.id, "ann")
        assert read.attempts in (int(printed[-1]), int(printed[-1]) + 1)
        assert read == record.model_copy(update={"attempts": read.attempts, "updated_at": read.updated_at})


def test_killed_while_it_makes_and_ends_jobs(tmp_path: Path) -> None:
    store, printed = JobStore(str(tmp_path)), set[str]()
    draw = Random(1)
    for _ in range(6):
        printed |= {*lines_until_killed(MAKES_AND_ENDS, str(tmp_path), num_lines=draw.randrange(2, 12))}
    by_status: dict[str, set[str]] = {"queued": set(), "running": set(), "completed": set()}
    for job in store.list("ann"):
        by_status[job.status].add(job.id)

    assert by_status["completed"] >= printed
    assert store.counts().total() == sum(map(len, by_status.values())) <= len(printed) + 6
    assert {job.id for job in store.unfinished()} == by_status["queued"] | by_status["running"]


@pytest.mark.parametrize("name", ["job.json", "done.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "binary", "list", "deep", "other", "status"])
def test_a_damaged_record_is_of_a_job_that_failed(
    local: JobStore, tmp_path: Path, clock: Clock, name: str, damage: str
) -> None:
    whole, record = new_job(local), new_job(local)
    good = record.revised(status="completed" if name == "done.json" else "running")
    data = {
        "empty": b"",
        "half": good.json_bytes()[:-40],
        "binary": b"\xff\xfe\0",
        "list": b"[]",
        "deep": b"[" * 100_000,
        "other": good.revised(id=whole.id).json_bytes(),
        "status": good.revised(status="running" if name == "done.json" else "completed").json_bytes(),
    }[damage]
    file = tmp_path / "jobs" / record.id / name
    file.write_bytes(data)
    clock.now = written_at = file.stat().st_mtime

    read = local.read(record.id, "ann")
    assert (read.status, read.error) == ("failed", "the record of this job is damaged")
    assert local.unfinished() == [whole]
    with pytest.raises(JobFinished):
        local.update(record)
    assert local.expire(written_at + 86399) == 0
    assert local.expire(written_at + 86401) == 1
    assert not file.parent.exists()


def test_a_field_of_a_newer_server_is_no_damage(local: JobStore, tmp_path: Path) -> None:
    record = new_job(local)
    data = record.json_bytes().replace(b"{", b'{"surprise": 1,', 1)
    (tmp_path / "jobs" / record.id / "job.json").write_bytes(data)

    assert local.read(record.id, "ann") == record
