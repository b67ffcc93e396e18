"""When so many inputs are bad that the job is to fail: the input is wrong, not some of its images."""

import io
from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit
from pipelines.latent_table import Rejected

__all__ = ["NUM_EXAMPLES", "example", "require_good_commits", "require_good_share"]

NUM_EXAMPLES = 10


def example(rejected: Rejected) -> str:
    """One bad input on one line."""
    detail = f" ({rejected.detail})" if rejected.detail else ""
    return f"{rejected.source}#{rejected.key or rejected.position}: {rejected.reason}{detail}"


def require_good_share(num_bad: int, num_inputs: int, max_bad_share: float, examples: Sequence[str]) -> None:
    """UserError, naming the first bad inputs, where more than ``max_bad_share`` of all are bad."""
    if num_bad <= max_bad_share * num_inputs:
        return
    raise UserError(
        f"{num_bad} of {num_inputs} inputs cannot be encoded, the first of them: {'; '.join(examples)}",
        allowed=f"a share of {max_bad_share:g}",
        do="see OUTPUT/quarantine; put the input right, or raise --max-bad-share, and run again",
    )


def require_good_commits(dataset: LatentDataset, commits: Iterable[Commit], max_bad_share: float) -> None:
    """`require_good_share` of committed units; their quarantine files are read only to name the first."""
    num_bad = num_inputs = 0
    bad: list[Commit] = []
    for commit in commits:
        num_bad, num_inputs = num_bad + commit.num_quarantined, num_inputs + commit.num_inputs
        if commit.quarantine_file is not None and len(bad) < NUM_EXAMPLES:
            bad.append(commit)
    if num_bad > max_bad_share * num_inputs:
        require_good_share(num_bad, num_inputs, max_bad_share, _first_examples(dataset, bad))


def _first_examples(dataset: LatentDataset, commits: Iterable[Commit]) -> list[str]:
    examples: list[str] = []
    for commit in commits:
        assert commit.quarantine_file is not None
        data = dataset.filesystem.cat_file(dataset.path(commit.quarantine_file.path))
        examples += [example(Rejected(**row)) for row in pq.read_table(io.BytesIO(data)).to_pylist()]
    return examples[:NUM_EXAMPLES]
