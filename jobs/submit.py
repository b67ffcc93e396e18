"""``ldm submit``: run the job of a YAML file on a Ray cluster, through its job server."""

import sys
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from jobs.job_file import read_job
from jobs.job_server import JobServer

__all__ = ["SubmitJob", "show_log"]


class SubmitJob(JobServer, JobConfig):
    """Check the job in the YAML file JOB, and run it on a cluster.

    JOB names a command and its options, the folder or image that it runs in, and variables of the environment
    to pass on. Nothing is sent before all options are checked. docs/jobs.md describes the file. With --follow
    or --wait the exit status is the job's own.
    """

    job: CliPositionalArg[Path] = Field(description="YAML file of a job")
    follow: bool = Field(False, description="show what the job prints until it ends")
    wait: bool = Field(False, description="wait until the job ends")

    def run(self) -> dict[str, object]:
        """The job's id; status, where its end was waited for."""
        job = read_job(self.job)
        job.check(self.job, on_cluster=True)
        job.runtime_env()  # a variable that is not set is found before anyone is asked
        client = self.connect()
        job_id = client.submit(job, {"name": self.job.stem})
        print(f"submitted {job_id}: ldm {job.command}", flush=True)
        if not (self.follow or self.wait):
            return {"job": job_id}
        try:
            if self.follow:
                client.follow(job_id, show_log)
            client.wait_for_success(job_id)
        except KeyboardInterrupt:
            print(f"{job_id} goes on; to end it: ldm jobs stop {job_id}", file=sys.stderr)
            raise
        return {"job": job_id, "status": "SUCCEEDED"}


def show_log(text: str) -> None:
    """A part of a job's log, as it comes."""
    print(text, end="", flush=True)
