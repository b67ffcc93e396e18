"""``ldm jobs stop``: end a submitted job."""

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from jobs.job_server import JobServer

__all__ = ["JobsStopJob"]

TIMEOUT_S = 60.0


class JobsStopJob(JobServer, JobConfig):
    """Ask a job to end, and wait until it has.

    Ray sends it SIGTERM, and SIGKILL 3 s later. What it has committed stays; submit it again to go on.
    """

    job: CliPositionalArg[str] = Field(description="id of the job, as ldm jobs list shows it")

    def run(self) -> dict[str, object]:
        """The job's id and how it ended."""
        client = self.connect()
        client.stop(self.job)
        status = client.wait(self.job, TIMEOUT_S).status.value
        print(f"{self.job} {status}")
        return {"job": self.job, "status": status}
