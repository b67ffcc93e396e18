"""Proving a latent dataset: every row accounted for, every file as committed, nothing twice.

Bytes are read once, several units at a time; of each row, eight bytes are kept (a hash of shard and key),
so that a hundred million rows take about 2.4 GB while they are sorted.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ldm.channel_stats import LatentStats
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit, DataFile
from pipelines.latent_table import MomentArrays, read_latents
from pipelines.unit_ids import parse_unit_id

__all__ = ["Findings", "Proof", "verify"]

SHOWN_OF_A_KIND = 20
UNITS_AT_ONCE = 8
# Sums in another order: statistics are merged pair by pair.
STATS_RTOL = 1e-9


@dataclass
class Findings:
    """What is wrong: how often of each kind, and the first of them in words."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, text: str) -> None:
        """One more."""
        self.counts[kind] += 1
        if len(self.shown[kind]) < SHOWN_OF_A_KIND:
            self.shown[kind].append(text)

    def lines(self) -> list[str]:
        """One per finding, at most `SHOWN_OF_A_KIND` of a kind, then how many more there are."""
        lines = []
        for kind, texts in sorted(self.shown.items()):
            lines += [f"{kind}: {text}" for text in texts]
            if (more := self.counts[kind] - len(texts)) > 0:
                lines.append(f"{kind}: and {more} more")
        return lines


@dataclass(frozen=True)
class Proof:
    """What was checked, and what was found wrong."""

    units: int
    rows: int
    files: int
    bytes: int
    findings: Findings


@dataclass
class _UnitCheck:
    """What reading one unit's files told."""

    findings: list[tuple[str, str]]
    keys: dict[str, list[str]]


def verify(dataset: LatentDataset, progress: Callable[[int], None] = lambda units: None) -> Proof:
    """Check every committed unit that counts. progress: called with the number of units checked so far."""
    findings = Findings()
    units = rows = files = size = 0
    hashes: dict[str, list[NDArray[np.uint64]]] = defaultdict(list)
    shards: dict[str, dict[int, bool]] = defaultdict(dict)
    for commit, check in _checked(dataset):
        name, _, index = parse_unit_id(commit.unit)
        shards[name][index] = commit.is_final
        units, rows = units + 1, rows + commit.num_rows
        files, size = files + len(commit.all_files()), size + sum(f.bytes for f in commit.all_files())
        for kind, text in check.findings:
            findings.add(kind, text)
        for resolution, keys in check.keys.items():
            hashes[resolution].append(_hashes(name, keys))
        progress(units)
    _check_shards(shards, findings)
    for resolution, parts in hashes.items():
        _check_keys(dataset, resolution, parts, findings)
    _check_derived(dataset, findings)
    return Proof(units, rows, files, size, findings)


def _checked(dataset: LatentDataset) -> Iterator[tuple[Commit, _UnitCheck]]:
    """Every commit that counts with its check, a bounded number under way at a time."""
    commits = dataset.commits()
    with ThreadPoolExecutor(UNITS_AT_ONCE) as pool:
        while some := list(islice(commits, 8 * UNITS_AT_ONCE)):
            yield from zip(some, pool.map(lambda commit: _check_unit(dataset, commit), some), strict=True)


def _check_unit(dataset: LatentDataset, commit: Commit) -> _UnitCheck:
    check = _UnitCheck([], {})
    if commit.num_rows + commit.num_quarantined != commit.num_inputs:
        account = f"{commit.num_rows} rows + {commit.num_quarantined} quarantined"
        check.findings.append(("account", f"{commit.unit}: {commit.num_inputs} inputs are not {account}"))
    parts: list[LatentStats] = []
    for file in commit.files:
        if (data := _read(dataset, commit, file, check)) is not None:
            _check_data(commit, file, data, check, parts)
    for others in (commit.text_file, commit.quarantine_file):
        if others is not None and (data := _read(dataset, commit, others, check)) is not None:
            _check_rows(commit, others, _num_rows(data), check)
    for resolution, keys in check.keys.items():
        if len(keys) != commit.num_rows:
            told = f"{len(keys)} rows at {resolution}, not {commit.num_rows}"
            check.findings.append(("account", f"{commit.unit}: {told}"))
    if not check.findings:
        _check_stats(commit, parts, check)
    return check


def _read(dataset: LatentDataset, commit: Commit, file: DataFile, check: _UnitCheck) -> bytes | None:
    """The bytes of a file that are what was committed; else None, and a finding."""
    try:
        data: bytes = dataset.filesystem.cat_file(dataset.path(file.path))
    except FileNotFoundError:
        check.findings.append(("missing", f"{file.path} of unit {commit.unit}"))
        return None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        told = f"{len(data)} bytes, {file.bytes} were committed"
        check.findings.append(("damaged", f"{file.path} of unit {commit.unit} ({told})"))
        return None
    return data


def _check_data(
    commit: Commit, file: DataFile, data: bytes, check: _UnitCheck, parts: list[LatentStats]
) -> None:
    try:
        rows = read_latents(io.BytesIO(data))
    except (OSError, pa.ArrowException, KeyError) as error:
        check.findings.append(("unreadable", f"{file.path}: {error}"))
        return
    _check_rows(commit, file, len(rows.keys), check)
    resolution = file.path.split("/")[1].split("-")[0]
    check.keys.setdefault(resolution, []).extend(rows.keys)
    parts.append(_stats(rows.moments))


def _check_rows(commit: Commit, file: DataFile, num_rows: int, check: _UnitCheck) -> None:
    if num_rows != file.rows:
        check.findings.append(("account", f"{file.path}: {num_rows} rows, {file.rows} were committed"))


def _num_rows(data: bytes) -> int:
    return int(pq.read_metadata(io.BytesIO(data)).num_rows)


def _stats(moments: MomentArrays) -> LatentStats:
    mean_CN, std_CN = (
        values.astype(np.float64).swapaxes(0, 1).reshape(values.shape[1], -1) for values in moments
    )
    centre_C = mean_CN.mean(1)
    m2_C = ((mean_CN - centre_C[:, None]) ** 2 + std_CN**2).sum(1)
    return LatentStats(mean_CN.shape[1], tuple(centre_C.tolist()), tuple(m2_C.tolist()))


def _check_stats(commit: Commit, parts: Sequence[LatentStats], check: _UnitCheck) -> None:
    if commit.stats is None or not parts:
        if commit.num_rows:
            check.findings.append(("statistics", f"{commit.unit} has rows and no statistics"))
        return
    found = LatentStats.merge_all(parts)
    scale = np.sqrt(np.array(found.m2_C) / found.count) + 1e-30
    same_mean = np.abs(np.array(found.mean_C) - commit.stats.mean) <= STATS_RTOL * scale
    same_m2 = np.isclose(found.m2_C, commit.stats.m2, rtol=STATS_RTOL, atol=1e-30)
    if found.count != commit.stats.count or not (same_mean.all() and same_m2.all()):
        check.findings.append(("statistics", f"those of {commit.unit} are not those of its rows"))


def _check_shards(shards: dict[str, dict[int, bool]], findings: Findings) -> None:
    for name, finals in sorted(shards.items()):
        missing = sorted(set(range(max(finals) + 1)) - set(finals))
        if missing:
            findings.add("incomplete", f"shard {name} lacks unit {missing[0]} ({len(missing)} in all)")
        elif [index for index, is_final in finals.items() if is_final] != [max(finals)]:
            findings.add("incomplete", f"shard {name} is not encoded to its end; run ldm encode again")


def _hashes(shard_name: str, keys: Iterable[str]) -> NDArray[np.uint64]:
    digests = (hashlib.blake2b(f"{shard_name}\x1f{key}".encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), "<u8")


def _check_keys(
    dataset: LatentDataset, resolution: str, parts: list[NDArray[np.uint64]], findings: Findings
) -> None:
    """Keys that occur twice in one shard. Equal hashes are suspects; the keys themselves decide."""
    values, counts = np.unique(np.concatenate(parts), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    seen: Counter[tuple[str, str]] = Counter()
    for commit in dataset.commits():
        name, _, _ = parse_unit_id(commit.unit)
        for file in (f for f in commit.files if f.path.split("/")[1].startswith(f"{resolution}-")):
            with dataset.filesystem.open(dataset.path(file.path), "rb") as stream:
                keys = pq.read_table(stream, columns=["key"])["key"].to_pylist()
            pairs = zip(keys, _hashes(name, keys).tolist(), strict=True)
            seen.update((name, key) for key, value in pairs if value in suspects)
    for (name, key), times in seen.items():
        if times > 1:
            findings.add("duplicate", f"key {key!r} of shard {name} has {times} rows at {resolution}")


def _check_derived(dataset: LatentDataset, findings: Findings) -> None:
    derived = dataset.derived()
    for name, expected in (
        ("stats.json", derived.stats_json()),
        ("manifest.parquet", derived.manifest_parquet()),
    ):
        try:
            stored = dataset.filesystem.cat_file(dataset.path(name))
        except FileNotFoundError:
            stored = b""
        if stored != expected:
            findings.add("stale", f"{name} is not of the commits; --repair writes it again")
