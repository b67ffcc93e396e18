"""Ray's own client of a job server, with deadlines, and errors that say what to do. Imports Ray."""

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

from jobs.job_file import JobFile, command_line
from ldm.errors import LdmError, UserError

__all__ = ["JobClient", "JobServerError", "RemoteJobError"]

REQUEST_TIMEOUT_S = 60.0  # between two bytes: a package may take longer
POLL_S = 1.0
LOST_S = 120.0  # a head that is started again with its state kept is back by then
QUIET_S = 30.0  # without a word, so long, it is asked whether the job still runs
MAX_TAILS = 20  # log streams in a row that broke at once and brought nothing
# Ray takes these before what it is given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class JobServerError(LdmError):
    """A job server that fails, or cannot be reached any more."""


class RemoteJobError(LdmError):
    """A submitted job that did not succeed. ``exit_status``: its own, 1 where Ray does not tell it."""

    def __init__(self, details: JobDetails) -> None:
        code = details.driver_exit_code
        self.exit_status = 1 if not code else 128 - code if code < 0 else code
        said = f"exit status {self.exit_status}" if code else (details.message or "no reason given")
        first_line = (said.splitlines() or [""])[0]
        super().__init__(f"job {details.submission_id} {details.status.value}: {first_line}")


class JobClient:
    """Submit jobs, watch them and stop them. Every request has a deadline."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        with _explained(url), _without(ADDRESS_VARIABLES):
            self._ray = _RayClient(url, headers={"Authorization": f"Bearer {token}"} if token else {})

    def submit(self, job: JobFile, metadata: Mapping[str, str]) -> str:
        """Send a job that was checked; returns its id."""
        resources = job.resources
        try:
            with _explained(self.url):
                return self._ray.submit_job(
                    entrypoint=command_line(job.command, job.options_there()),
                    runtime_env=job.runtime_env(),
                    metadata=dict(metadata),
                    entrypoint_num_cpus=resources.num_cpus or None,
                    entrypoint_num_gpus=resources.num_gpus or None,
                    entrypoint_memory=resources.memory_bytes or None,
                    entrypoint_resources=dict(resources.custom) or None,
                )
        except ValueError as error:  # Ray's, of a working_dir that is not there or too large
            raise UserError(str(error)) from error

    def details(self, job_id: str) -> JobDetails:
        """What is known of a job. Waits for a server that is gone for a while; UserError for no such job."""
        retrying = Retrying(
            retry=retry_if_exception(_is_lost),
            stop=stop_after_delay(LOST_S),
            wait=wait_exponential(multiplier=0.5, max=5),
            reraise=True,
        )
        with _explained(self.url):
            return retrying(self._ray.get_job_info, job_id)

    def jobs(self) -> list[JobDetails]:
        """Those that were submitted, in the order of their start."""
        with _explained(self.url):
            found = self._ray.list_jobs()
        submitted = [details for details in found if details.submission_id]
        return sorted(submitted, key=lambda details: details.start_time or 0)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False where it had ended before."""
        with _explained(self.url):
            return bool(self._ray.stop_job(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far."""
        with _explained(self.url):
            return str(self._ray.get_job_logs(job_id))

    def wait(self, job_id: str, timeout_s: float = float("inf")) -> JobDetails:
        """Return when the job has ended; JobServerError where it has not in time. Jobs may take days."""
        deadline_s = time.monotonic() + timeout_s
        while not (details := self.details(job_id)).status.is_terminal():
            if time.monotonic() > deadline_s:
                raise JobServerError(f"job {job_id} is {details.status.value} after {timeout_s:g} s")
            time.sleep(POLL_S)
        return details

    def wait_for_success(self, job_id: str) -> None:
        """As `wait`; RemoteJobError where the job did not succeed."""
        details = self.wait(job_id)
        if details.status != JobStatus.SUCCEEDED:
            raise RemoteJobError(details)

    def follow(self, job_id: str, show: Callable[[str], None]) -> None:
        """Show a job's log from its beginning to its end, each character once, across lost connections."""
        self.details(job_id)
        shown, fruitless = _Shown(show), 0
        while fruitless < MAX_TAILS:
            started_s, before, is_whole = time.monotonic(), shown.count, False
            with suppress(aiohttp.ClientError, OSError, RuntimeError):
                is_whole = asyncio.run(self._tail(job_id, shown))
            if self.details(job_id).status.is_terminal():
                if not is_whole:
                    shown.restart()
                    shown.add(self.logs(job_id))
                return
            is_fruitless = shown.count == before and time.monotonic() - started_s < QUIET_S
            fruitless = fruitless + 1 if is_fruitless else 0
            time.sleep(POLL_S)
        raise JobServerError(
            f"{self.url} does not send the log of {job_id}; the job goes on: ldm jobs logs {job_id}"
        )

    async def _tail(self, job_id: str, shown: "_Shown") -> bool:
        """Follow one stream from the log's beginning; True where it came to its end."""
        chunks = self._ray.tail_job_logs(job_id)
        shown.restart()
        next_chunk = asyncio.ensure_future(anext(chunks, None))
        try:
            while True:
                done, _ = await asyncio.wait({next_chunk}, timeout=QUIET_S)
                if not done:
                    # A head that vanished closes nothing: the stream alone would wait for ever.
                    if self.details(job_id).status.is_terminal():
                        return False
                    continue
                chunk = next_chunk.result()
                if chunk is None:
                    return True
                shown.add(chunk)
                next_chunk = asyncio.ensure_future(anext(chunks, None))
        finally:
            next_chunk.cancel()


class _Shown:
    """How much of a log was shown, so that a stream from its beginning repeats none of it."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self.count, self._position = show, 0, 0

    def restart(self) -> None:
        self._position = 0

    def add(self, chunk: str) -> None:
        new = chunk[max(self.count - self._position, 0) :]
        self._position += len(chunk)
        self.count = max(self.count, self._position)
        if new:
            self._show(new)


class _RayClient(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **options)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """What Ray's client raises, in one line. Its messages hold the server's answers, not what was sent."""
    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"{url} refuses the token", do="set RAY_AUTH_TOKEN_PATH to a file with that cluster's token"
        ) from error
    except OSError as error:
        raise JobServerError(f"no answer from {url}: {type(error).__name__}") from error
    except RuntimeError as error:
        raise _of_status(url, str(error)) from error


def _is_lost(error: BaseException) -> bool:
    """Whether a server that is being started again may have caused it. requests' errors are OSErrors."""
    is_its_own = isinstance(error, RuntimeError) and "status code 5" in str(error)
    return isinstance(error, OSError) or is_its_own


def _of_status(url: str, message: str) -> LdmError:
    found = re.search(r"status code (\d+): (.*)", message, flags=re.DOTALL)
    if found is None:
        return JobServerError(f"{url}: {message}")
    status, body = int(found[1]), found[2].strip().rstrip(".")
    last_line = (body.splitlines() or [""])[-1]
    if status == 404:
        return UserError(f"{url}: {last_line}", do="see ldm jobs list")
    return JobServerError(f"{url} answers {status}: {last_line}")


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
