"""A driver process that encodes with the emulated encoder; the fault tests kill it and its workers.

usage: drive_encode.py INPUT OUTPUT ADDRESS LOG SECONDS_PER_IMAGE [MARKER]

ADDRESS ``local`` starts a cluster of its own. Where MARKER is given and not there yet, the first
encoder makes it and dies by SIGKILL between its unit's data and its commit.
"""

import os
import signal
import sys
from pathlib import Path

import ray
from ray.cloudpickle import register_pickle_by_value

from ldm.preprocess import Preprocess
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit, DatasetHeader
from pipelines.encode.backlog import find_backlog
from pipelines.encode.decode import Judge
from pipelines.encode.emulated import EmulatedEncoder
from pipelines.encode.pipeline import ActorStage, encode
from pipelines.encode.pools import ActorPool, TaskPool
from pipelines.shards import list_shards

PREPROCESS = Preprocess(sizes_px=(32,))


class DiesBeforeItsFirstCommit(LatentDataset):
    """Kills its process once, when the unit's files are published and its commit is not."""

    marker: Path | None = None

    def commit(self, commit: Commit) -> None:
        if self.marker is not None:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        super().commit(commit)


def main(source: str, output: str, address: str, log: str, seconds_per_image: str, marker: str = "") -> None:
    register_pickle_by_value(sys.modules[__name__])
    header = DatasetHeader(
        vae="emulated", vae_fingerprint="0", f=8, channels=3, preprocess=PREPROCESS, unit_size=8
    )
    sizes = {"num_cpus": 4, "include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, **sizes)
    dataset = DiesBeforeItsFirstCommit.create_or_check(output, header)
    dataset.marker = Path(marker) if marker else None
    summary = encode(
        dataset,
        find_backlog(list_shards(source), dataset),
        Judge(PREPROCESS),
        decode_pool=TaskPool(num_cpus=0.5),
        encoder=ActorStage(
            EmulatedEncoder,
            {"f": 8, "seconds_per_image": float(seconds_per_image), "log": log or None},
            ActorPool(num_cpus=0.5, min_size=2, max_size=2),
        ),
    )
    print(summary.units_done, summary.units_skipped, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
