"""``ldm jobs list``: the jobs of a cluster."""

from datetime import UTC, datetime

from jobs.config import JobConfig
from jobs.job_server import JobServer

__all__ = ["JobsListJob"]


class JobsListJob(JobServer, JobConfig):
    """List the jobs submitted to a cluster, oldest first: id, name, status, exit status, start, command."""

    def run(self) -> dict[str, object]:
        """The jobs. Never their environment, which holds secrets."""
        found = []
        for details in self.connect().jobs():
            started = datetime.fromtimestamp((details.start_time or 0) / 1000, UTC)
            job: dict[str, object] = {
                "job": details.submission_id,
                "name": (details.metadata or {}).get("name", ""),
                "status": details.status.value,
                "exit_status": details.driver_exit_code,
                "started": started.isoformat(timespec="seconds"),
                "command": _shown(details.entrypoint),
            }
            found.append(job)
            print("  ".join("-" if value in (None, "") else str(value) for value in job.values()))
        return {"jobs": found}


def _shown(entrypoint: str) -> str:
    """The first line of a job's command line: its options are on those after it."""
    line = (entrypoint.splitlines() or [""])[0]
    return line.removeprefix("exec python -m jobs.cli ").partition(" --config /dev/stdin")[0]
