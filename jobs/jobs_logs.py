"""``ldm jobs logs``: what a submitted job has printed."""

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from jobs.job_server import JobServer
from jobs.submit import show_log

__all__ = ["JobsLogsJob"]


class JobsLogsJob(JobServer, JobConfig):
    """Show what a job has printed so far; with --follow until it ends."""

    job: CliPositionalArg[str] = Field(description="id of the job, as ldm jobs list shows it")
    follow: bool = Field(False, description="go on until the job ends")

    def run(self) -> dict[str, object]:
        """The job's id and status."""
        client = self.connect()
        if self.follow:
            client.follow(self.job, show_log)
        else:
            show_log(client.logs(self.job))
        return {"job": self.job, "status": client.details(self.job).status.value}
