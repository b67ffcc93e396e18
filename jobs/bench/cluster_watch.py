"""Prints a JSON line a second: living nodes of each pool of an autoscaling cluster, until its input ends.

usage: python -m jobs.bench.cluster_watch HOST:PORT POOL …
"""

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import PIPE, Popen

from jobs.bench.cluster_facts import Look
from jobs.bench.raylets import Head

__all__ = ["watched"]

LOOK_EVERY_S = 1.0


@contextmanager
def watched(head: Head, pools: Sequence[str]) -> Iterator[list[Look]]:
    """A list that gets looks as long as the block runs, by a process of its own: this one has another Ray."""
    looks: list[Look] = []
    command = [sys.executable, "-m", "jobs.bench.cluster_watch", head.address, *pools]
    with Popen(command, env=head.environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        first = process.stdout.readline()
        if not first:
            raise RuntimeError("the watching process has ended before its first look")
        looks.append(_look(first))
        reading = threading.Thread(target=lambda: looks.extend(map(_look, process.stdout or ())), daemon=True)
        reading.start()
        try:
            yield looks
        finally:
            process.stdin.close()
            reading.join(60)
    if process.returncode:
        raise RuntimeError(f"the watching process ended with status {process.returncode}")


def _look(line: str) -> Look:
    found = json.loads(line)
    return Look(found["at_s"], found["nodes"])


def main(address: str, pools: Sequence[str]) -> None:
    """Until the input ends."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(ended,), daemon=True).start()
    while not ended.wait(LOOK_EVERY_S):
        status = get_cluster_status(address)
        living = Counter(node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes))
        print(json.dumps({"at_s": time.time(), "nodes": {pool: living[pool] for pool in pools}}), flush=True)


def _wait_for_the_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
