"""Units are a pure function of the shard, its samples and the unit size."""

import hashlib
from collections.abc import Iterator

import pytest

from ldm.errors import BadSampleError
from pipelines.encode.units import slice_units
from pipelines.shards import Sample, Shard
from pipelines.unit_ids import parse_unit_id, unit_id

SHARD = Shard("file:///in/a-b.tar", "a-b", "12-34")


def samples(count: int, damaged: bool = False) -> Iterator[Sample]:
    for index in range(count):
        yield Sample(f"k{index}", b"")
    if damaged:
        raise BadSampleError("broken_tar", "torn")


def test_id_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"a-b\x1f12-34\x1f256").hexdigest()[:8]
    assert unit_id(SHARD, 256, 7) == f"a-b-{digest}-000007"
    assert parse_unit_id(unit_id(SHARD, 256, 7)) == ("a-b", f"a-b-{digest}", 7)


def test_id_changes_with_version_and_unit_size() -> None:
    edited = Shard(SHARD.url, SHARD.name, "12-35")
    assert len({unit_id(SHARD, 256, 0), unit_id(edited, 256, 0), unit_id(SHARD, 128, 0)}) == 3


@pytest.mark.parametrize("text", ["", "a", "a-12345678", "a-1234567-000000", "a-12345678-x"])
def test_what_is_no_unit_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not <shard name>"):
        parse_unit_id(text)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_units_partition_the_shard_in_order(count: int) -> None:
    units = list(slice_units(SHARD, samples(count), 4))
    assert [s.key for unit in units for s in unit.samples] == [f"k{i}" for i in range(count)]
    assert [u.unit.index for u in units] == list(range(max(1, -(-count // 4))))
    assert [(u.unit.first, u.unit.last) for u in units] == [
        (start, min(start + 4, count) - 1) for start in range(0, max(count, 1), 4)
    ]
    assert [u.unit.is_final for u in units] == [False] * (len(units) - 1) + [True]


def test_committed_units_are_passed_over_and_the_others_unchanged() -> None:
    every = list(slice_units(SHARD, samples(10), 4))
    assert list(slice_units(SHARD, samples(10), 4, {0, 2})) == [every[1]]
    assert list(slice_units(SHARD, samples(10), 4, {0, 1, 2})) == []


@pytest.mark.parametrize(("count", "expected"), [(0, [0]), (3, [3]), (4, [4]), (5, [4, 1])])
def test_damage_belongs_to_the_last_unit_and_counts_as_one_input(count: int, expected: list[int]) -> None:
    units = list(slice_units(SHARD, samples(count, damaged=True), 4))
    assert [len(unit.samples) for unit in units] == expected
    assert [unit.damage is not None for unit in units] == [False] * (len(units) - 1) + [True]
    assert sum(unit.num_inputs for unit in units) == count + 1
