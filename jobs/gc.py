"""``ldm gc``: remove what killed writers and edited shards have left in a latent dataset."""

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig

__all__ = ["GcJob"]

SHOWN = 20


class GcJob(JobConfig):
    """List the files of a latent dataset that no commit names; with --delete remove them.

    It only lists unless told otherwise, because what is removed cannot be had again without encoding.
    Refused while a job writes the dataset.
    """

    dataset: CliPositionalArg[str] = Field(description="folder or URL of a latent dataset")
    retired: bool = Field(False, description="also versions of edited shards that no longer count")
    delete: bool = Field(False, description="remove them")

    def run(self) -> dict[str, object]:
        """files and bytes that are, or could be, removed."""
        from pipelines.dataset import LatentDataset
        from pipelines.garbage import find_garbage, remove_garbage
        from pipelines.lease import writer_lease

        dataset = LatentDataset.open(self.dataset)
        with writer_lease(dataset.filesystem, dataset.root, self.dataset):
            garbage = find_garbage(dataset, retired=self.retired)
            if self.delete:
                remove_garbage(dataset, garbage)
        for path in garbage.paths[:SHOWN]:
            print(path)
        if (more := len(garbage.paths) - SHOWN) > 0:
            print(f"and {more} more")
        done = "removed" if self.delete else "could be removed with --delete"
        print(f"{len(garbage.paths)} files, {garbage.bytes} bytes {done}")
        return {"files": len(garbage.paths), "bytes": garbage.bytes, "deleted": self.delete}
