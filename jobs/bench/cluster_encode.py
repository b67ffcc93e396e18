"""ENCODE with emulated encoders on a running cluster, as a driver process that ends when it is done.

usage: python -m jobs.bench.cluster_encode OPTIONS_AS_JSON
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from jobs.bench.cluster_facts import Committed
from jobs.bench.raylets import Head
from pipelines.encode.pools import ActorPool, TaskPool

__all__ = ["ClusterEncode", "Encoded"]

GPUS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Encoded:
    """begun_s: the first unit, unix time; cpu_share: of the machine's cores, from first to last commit."""

    commits: tuple[Committed, ...]
    begun_s: float
    rows: int
    cpu_share: float


class ClusterEncode(BaseModel):
    """gpus: that the cluster must have before the job begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    shards: Path
    out: Path
    size_px: int
    unit_size: int
    seconds_per_image: float
    read: TaskPool
    decode: TaskPool
    encoder: ActorPool
    subcluster: str | None = None
    gpus: int = 0

    def run(self, head: Head) -> Encoded:
        """In a process of its own. RuntimeError with the end of its log where it fails."""
        command = [sys.executable, "-m", "jobs.bench.cluster_encode", self.model_dump_json()]
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"encoding on the cluster failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        commits = tuple(Committed(*commit) for commit in found.pop("commits"))
        return Encoded(commits=commits, **found)


def main(options: ClusterEncode) -> None:
    """Encode, and print an `Encoded`."""
    from jobs.bench.emulated import encode_emulated
    from jobs.cluster import ClusterConfig, connected
    from pipelines.encode.report import UnitReport

    commits: list[tuple[float, int, int]] = []
    cpu_times: list[tuple[float, float]] = []

    def committed(report: UnitReport) -> None:
        commits.append((time.time(), report.pid, report.images))
        cpu_times.append(_idle_and_all_s())

    with connected(ClusterConfig(address=options.address)):
        _wait_for_gpus(options.gpus)
        summary = encode_emulated(
            options.shards,
            options.out,
            options.size_px,
            options.unit_size,
            options.encoder,
            seconds_per_image=options.seconds_per_image,
            read_pool=options.read,
            decode_pool=options.decode,
            subcluster=options.subcluster,
            watch=committed,
        )
    idle_s, all_s = (last - first for first, last in zip(cpu_times[0], cpu_times[-1], strict=True))
    result = {
        "commits": commits,
        "begun_s": summary.first_batch_at,
        "rows": summary.rows,
        "cpu_share": 1 - idle_s / all_s,
    }
    print(json.dumps(result), flush=True)


def _idle_and_all_s() -> tuple[float, float]:
    """Seconds of all cores since the machine started."""
    times = psutil.cpu_times()
    return times.idle + times.iowait, sum(times) - times.guest - times.guest_nice


def _wait_for_gpus(count: int) -> None:
    import ray

    deadline_s = time.monotonic() + GPUS_TIMEOUT_S
    while ray.cluster_resources().get("GPU", 0) < count:  # type: ignore[no-untyped-call]  # Ray's own
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the cluster has less than {count} GPUs after {GPUS_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main(ClusterEncode.model_validate_json(sys.argv[1]))
