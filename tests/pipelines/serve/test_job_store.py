"""What clients and runners see of long jobs, on a local disk and on an S3 server process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.serve.job_store import JobFinished, JobNotFound, JobRecord, JobStore, TooManyJobs
from tests.faults.conftest import s3_port, s3_url

# Fixtures.
__all__ = ["s3_port", "s3_url"]

ROOT = Path(__file__).resolve().parents[3]


class Clock:
    """Stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a folder that is not there yet."""
    return f"{request.getfixturevalue('s3_url')}/jobs" if request.param == "s3" else str(tmp_path / "jobs")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> JobStore:
    return JobStore(url, clock=clock)


@pytest.fixture
def local(tmp_path: Path, clock: Clock) -> JobStore:
    return JobStore(str(tmp_path / "jobs"), clock=clock)


def new_job(store: JobStore, principal: str = "ann", ttl_s: float = 50) -> JobRecord:
    return store.create({"prompt": "a lighthouse"}, principal, seed=2**63 - 1, ttl_s=ttl_s)


def completed(store: JobStore, record: JobRecord) -> JobRecord:
    return store.update(record.revised(status="completed", content_type="image/png", size="4x4"))


def filled(store: JobStore, record: JobRecord, folder: Path) -> JobRecord:
    """With some bytes in every file of a job; folder: a new one."""
    (folder / "tiles_files/0").mkdir(parents=True)
    for name in ("tiles.dzi", "tiles_files/0/0_0.jpg"):
        (folder / name).write_bytes(b"tiles")
    store.put_preview(record.id, b"preview")
    store.put_result(record.id, b"result", "image/png")
    store.put_tiles(record.id, folder)
    store.cancel(record.id, "ann")
    return record


def test_a_job_is_there_for_every_later_process(store: JobStore, url: str, clock: Clock) -> None:
    first = new_job(store)
    clock.now = 1001.0
    second = store.update(
        new_job(store).revised(status="running", stage="sampling", progress=0.25, attempts=1)
    )
    store.cancel(first.id, "ann")

    later = JobStore(url, clock=clock)

    assert later.unfinished() == [first, second]
    assert later.read(second.id, "ann") == second
    assert (later.is_cancelled(first.id), later.is_cancelled(second.id)) == (True, False)


def test_what_a_new_job_is(local: JobStore) -> None:
    record = new_job(local)

    assert record.model_dump(exclude={"id"}) == {
        "created_at": 1000.0, "updated_at": 1000.0, "expires_at": None, "ttl_s": 50.0, "principal": "ann",
        "request": {"prompt": "a lighthouse"}, "seed": 2**63 - 1, "status": "queued", "stage": None,
        "progress": 0.0, "attempts": 0, "has_preview": False, "error": None, "size": None,
        "content_type": None,
    }  # fmt: skip


def test_a_list_is_of_one_principal_and_newest_first(store: JobStore, clock: Clock) -> None:
    assert store.list("ann") == []
    jobs = []
    for clock.now, principal in enumerate(("ann", "ben", "ann", "ann"), start=1):
        jobs.append(new_job(store, principal))
    ended = completed(store, jobs[2])

    assert store.list("ann") == [jobs[3], ended, jobs[0]]
    assert store.list("ben") == [jobs[1]]
    assert store.unfinished() == [jobs[0], jobs[1], jobs[3]]
    assert store.counts() == {"queued": 3, "completed": 1}


def test_what_another_process_did_is_listed(url: str, store: JobStore) -> None:
    here, elsewhere = store, JobStore(url, clock=lambda: 1001.0)
    record = new_job(here)
    assert elsewhere.list("ann") == [record]
    ended = completed(here, record)

    assert elsewhere.list("ann") == [ended]
    assert elsewhere.read(record.id, "ann") == ended


def of_a_client(store: JobStore, job_id: str, principal: str) -> list[Callable[[], object]]:
    """Everything that a client can do with an id."""
    return [
        lambda: store.read(job_id, principal),
        lambda: store.cancel(job_id, principal),
        lambda: store.preview(job_id, principal),
        lambda: store.open_result(job_id, principal),
        lambda: store.dzi(job_id, principal),
        lambda: store.tile(job_id, principal, 0, 0, 0),
    ]


def of_a_runner(store: JobStore, job_id: str) -> list[Callable[[], object]]:
    """Everything that a runner puts into a folder, but records."""
    return [
        lambda: store.put_preview(job_id, b"png"),
        lambda: store.put_result(job_id, b"png", "image/png"),
        lambda: store.put_result(job_id, ROOT / "LICENSE", "image/png"),
        lambda: store.put_tiles(job_id, ROOT),
    ]


def test_another_ones_job_is_as_one_that_is_not_there(local: JobStore, tmp_path: Path) -> None:
    record = completed(local, filled(local, new_job(local), tmp_path / "made"))

    for ask in of_a_client(local, record.id, "ann"):
        ask()
    for ask in of_a_client(local, record.id, "ben") + of_a_client(local, "0" * 32, "ann"):
        with pytest.raises(JobNotFound):
            ask()


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        ".",
        "..",
        "../secret",
        "{id}/../{id}",
        "{id}/",
        "/{id}",
        "{id}\n",
        "{ID}",
        "*",
        "{id}0",
        "٠" * 32,
        "\0" * 32,
    ],
)
def test_an_id_of_another_form_never_becomes_a_path(local: JobStore, tmp_path: Path, job_id: str) -> None:
    record = new_job(local)
    job_id = job_id.format(id=record.id, ID=record.id.upper())
    (tmp_path / "secret").mkdir()
    for name in ("job.json", "cancel"):
        (tmp_path / "secret" / name).write_bytes(record.json_bytes())
    before = sorted(tmp_path.rglob("*"))

    asked = [
        lambda: local.is_cancelled(job_id),
        *of_a_client(local, job_id, "ann"),
        *of_a_runner(local, job_id),
    ]
    for ask in asked:
        with pytest.raises(JobNotFound):
            ask()
    with pytest.raises(ValidationError):
        record.revised(id=job_id)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_so_many_unfinished_jobs(url: str) -> None:
    store = JobStore(url, max_jobs=2, max_unfinished=3)
    first, _ = new_job(store), new_job(store)

    with pytest.raises(TooManyJobs) as caught:
        new_job(store)
    assert (caught.value.whose, caught.value.allowed) == ("principal", 2)
    new_job(store, "ben")
    with pytest.raises(TooManyJobs) as caught:
        new_job(store, "eve")
    assert (caught.value.whose, caught.value.allowed) == ("server", 3)
    completed(store, first)
    new_job(store)
    assert store.counts() == {"queued": 3, "completed": 1}


def test_bounds_are_exact_in_one_process(tmp_path: Path) -> None:
    store = JobStore(str(tmp_path), max_jobs=3)
    together = threading.Barrier(8)

    def ask(_: int) -> bool:
        together.wait(60)
        try:
            return bool(new_job(store))
        except TooManyJobs:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 3


def test_cancelling_is_a_wish_until_its_runner_ends_it(store: JobStore) -> None:
    record = new_job(store)
    assert store.cancel(record.id, "ann") == store.cancel(record.id, "ann") == record

    ended = store.update(record.revised(status="cancelled"))
    assert store.cancel(record.id, "ann") == ended


def test_what_has_ended_stays_as_it_is(store: JobStore) -> None:
    record = new_job(store)
    ended = completed(store, record)

    for late in (record.revised(status="running"), record.revised(status="failed"), ended):
        with pytest.raises(JobFinished):
            store.update(late)
    for put in of_a_runner(store, record.id):
        with pytest.raises(JobFinished):
            put()
    store.cancel(record.id, "ann")
    assert store.read(record.id, "ann") == ended
    assert not store.is_cancelled(record.id)
    assert store.preview(record.id, "ann") is None


def test_a_record_is_checked_before_it_is_written(local: JobStore) -> None:
    record = new_job(local)

    with pytest.raises(ValidationError):
        local.update(record.model_copy(update={"progress": 1.5}))
    assert local.read(record.id, "ann") == record
