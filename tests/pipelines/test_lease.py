"""One writer at a time, whoever races, dies or stalls."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from ldm.errors import UserError
from pipelines.lease import Lease, LeaseTiming, writer_lease
from pipelines.process import Process, is_dead, this_process

ROOT = Path(__file__).resolve().parents[2]
QUICK = LeaseTiming(renew_s=0.05, expire_s=0.5)
LOCAL = fsspec.filesystem("file")


class Racer:
    """A process of `lease_racer`, which does as it is told."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/pipelines/lease_racer.py")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def started(count: int) -> Iterator[list[Racer]]:
    """So many processes, ready."""
    with ExitStack() as ending:
        processes = [Racer() for _ in range(count)]
        for racer in processes:
            ending.callback(racer.end)
        assert {racer.answer() for racer in processes} == {"ready"}
        yield processes


@pytest.fixture(scope="module")
def racers() -> Iterator[list[Racer]]:
    """Eight processes, none of which holds a lease."""
    with started(8) as processes:
        yield processes


def holder_file(folder: Path) -> Path:
    """The one that counts."""
    return max((folder / "writers").glob("*.json"))


def rewrite(folder: Path, **process: object) -> None:
    """Change who holds the lease; as if released by nobody."""
    stored = json.loads(holder_file(folder).read_text())
    stored["process"] |= process
    stored["released"] = False
    holder_file(folder).write_text(json.dumps(stored))


def test_one_of_eight_processes_wins_every_race(racers: list[Racer], tmp_path: Path) -> None:
    for _ in range(40):
        for racer in racers:
            racer.tell(f"acquire {tmp_path}")
        answers = [racer.answer() for racer in racers]
        assert sum(answer == "held" for answer in answers) == 1, answers
        winner = racers[answers.index("held")]
        told = (
            f"the dataset is being written by process {winner.process.pid} on {socket.gethostname()} since 2"
        )
        assert all(told in answer for answer in answers if answer != "held"), answers
        winner.tell("release")
        assert winner.answer() == "released"
    assert len([*(tmp_path / "writers").iterdir()]) == 1


def test_never_two_at_once_while_leases_come_and_go(racers: list[Racer], tmp_path: Path) -> None:
    for racer in racers:
        racer.tell(f"storm {tmp_path} 15")
    assert [racer.answer() for racer in racers] == ["done"] * 8


def test_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    with started(3) as chain:
        chain[0].tell(f"acquire {tmp_path}")
        assert chain[0].answer() == "held"
        for victim, heir in pairwise(chain):
            victim.process.send_signal(signal.SIGKILL)
            while not is_zombie(victim.process.pid):
                time.sleep(0.01)
            started_s = time.monotonic()
            heir.tell(f"acquire {tmp_path}")
            assert heir.answer() == "held"
            assert time.monotonic() - started_s < 1.5  # it would expire after 2 s


def is_zombie(pid: int) -> bool:
    """Dead, and nobody has waited for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def test_second_one_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with writer_lease(LOCAL, str(tmp_path), "d", QUICK) as lease:
        with pytest.raises(UserError, match=f"d is being written by process {os.getpid()}"):
            writer_lease(LOCAL, str(tmp_path), "d", QUICK).__enter__()
        lease.check()
    with writer_lease(LOCAL, str(tmp_path), "d", QUICK):
        pass


class LateListing(LocalFileSystem):
    """Between its first listing of a folder and the answer, other things happen."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = [meanwhile]

    def ls(self, path: str, **options: object) -> list[str]:
        listed: list[str] = super().ls(path, **options)
        if self.meanwhile:
            self.meanwhile.pop()()
        return listed


def test_a_late_comer_does_not_win_with_an_old_number(tmp_path: Path) -> None:
    def hold() -> AbstractContextManager[Lease]:
        return writer_lease(LOCAL, str(tmp_path), "d", QUICK)

    with ExitStack() as others:

        def come_and_go() -> None:
            with hold():
                pass
            others.enter_context(hold())

        with hold():
            pass
        # It saw generation 1. By now 2 has been and is gone, and 3 holds: 2 is free to be made again.
        late = LateListing(come_and_go, skip_instance_cache=True)
        with pytest.raises(UserError, match="is being written by process"):
            writer_lease(late, str(tmp_path), "d", QUICK).__enter__()
        assert [path.name for path in (tmp_path / "writers").iterdir()] == ["00000003.json"]


def test_released_also_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writer_lease(LOCAL, str(tmp_path), "d", QUICK):
        raise ZeroDivisionError
    with writer_lease(LOCAL, str(tmp_path), "d", QUICK):
        pass


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_silent_lease_of_another_machine_expires(tmp_path: Path, scheme: str) -> None:
    store, root = fsspec.filesystem(scheme), str(tmp_path)
    with writer_lease(store, root, "d", QUICK):
        pass
    (path,) = store.ls(f"{root}/writers", detail=False)
    stored = json.loads(store.cat_file(path))
    # A clock that is a century ahead: its times must not count.
    stored |= {"released": False, "renewed_at": "2126-01-01T00:00:00+00:00"}
    stored["process"]["space"] = "another machine"
    store.pipe_file(path, json.dumps(stored).encode())
    started_s = time.monotonic()
    with writer_lease(store, root, "d", QUICK):
        assert QUICK.expire_s <= time.monotonic() - started_s < QUICK.expire_s + 1


def test_renewed_lease_of_another_machine_is_respected(tmp_path: Path) -> None:
    with writer_lease(LOCAL, str(tmp_path), "d", QUICK):
        pass
    rewrite(tmp_path, space="another machine", host="far", pid=7)
    stop = threading.Event()

    def renew() -> None:
        # A clock a century behind, that ticks.
        for tick in range(1000):
            stored = json.loads(holder_file(tmp_path).read_text())
            stored["renewed_at"] = f"1926-01-01T00:00:00.{tick:03d}+00:00"
            partial = tmp_path / "partial"
            partial.write_text(json.dumps(stored))
            partial.replace(holder_file(tmp_path))
            if stop.wait(0.1):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match="d is being written by process 7 on far since"):
        writer_lease(LOCAL, str(tmp_path), "d", QUICK).__enter__()
    stop.set()
    thread.join()


def test_loser_of_a_takeover_is_told(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(UserError, match="d: this run lost the right to write"),
        writer_lease(LOCAL, str(tmp_path), "d", QUICK) as lease,
    ):
        path = holder_file(tmp_path)
        path.with_name("00000002.json").write_bytes(path.read_bytes())
        deadline_s = time.monotonic() + 5
        while lease.is_held and time.monotonic() < deadline_s:
            time.sleep(0.01)
        with pytest.raises(UserError, match="lost the right"):
            lease.check()
    # It did not touch the lease of the one that took over.
    assert json.loads((tmp_path / "writers/00000002.json").read_text())["released"] is False


def test_lease_that_cannot_be_renewed_is_lost_in_time(tmp_path: Path) -> None:
    writers = tmp_path / "writers"
    with (  # noqa: PT012
        pytest.raises(UserError, match="lost the right"),
        writer_lease(LOCAL, str(tmp_path), "d", QUICK) as lease,
    ):
        started_s = time.monotonic()
        writers.rename(tmp_path / "away")
        writers.write_text("in the way of the folder")
        while lease.is_held:
            time.sleep(0.01)
        assert time.monotonic() - started_s < QUICK.expire_s + 1
    assert writers.read_text() == "in the way of the folder"


def test_unreadable_lease_is_told(tmp_path: Path) -> None:
    (tmp_path / "writers").mkdir()
    (tmp_path / "writers/00000001.json").write_text("{}")
    with pytest.raises(UserError, match="is no lease that this version reads"):
        writer_lease(LOCAL, str(tmp_path), "d", QUICK).__enter__()


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = this_process()
    assert me.is_here() and not is_dead(me)
    assert is_dead(me.model_copy(update={"started": me.started - 1}))  # its number was used again
    elsewhere = Process(host=me.host, space="elsewhere", pid=me.pid, started=0)
    assert not elsewhere.is_here() and not is_dead(elsewhere)
