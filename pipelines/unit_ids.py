"""Names of units: a pure function of a shard's name, its version and the unit size."""

import hashlib

from pipelines.shards import Shard

__all__ = ["parse_unit_id", "unit_family", "unit_id"]


def unit_family(shard: Shard, unit_size: int) -> str:
    """What the ids of all units of a shard begin with: ``<shard name>-<8 hex digits>``.

    The digits cover the shard's version and the unit size, so that an edited shard, or a run with
    units of another size, never takes the name of what is already committed.
    """
    text = "\x1f".join((shard.name, shard.version, str(unit_size)))
    return f"{shard.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def unit_id(shard: Shard, unit_size: int, index: int) -> str:
    """Name of one unit, and of every file that comes from it."""
    return f"{unit_family(shard, unit_size)}-{index:06d}"


def parse_unit_id(identifier: str) -> tuple[str, str, int]:
    """(shard name, family, index) of a unit id. ValueError where it is none."""
    family, _, index = identifier.rpartition("-")
    name, _, digest = family.rpartition("-")
    if not name or len(digest) != 8 or not index.isdecimal():
        raise ValueError(f"{identifier!r} is not <shard name>-<8 hex digits>-<index>")
    return name, family, int(index)
