"""What was seen of a cluster → what it shows: nodes of each pool over time, units committed over time."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf

__all__ = ["Committed", "Look", "Phases", "autoscaling_facts", "steady_rate", "whole_rate"]


@dataclass(frozen=True)
class Look:
    """Living nodes of each pool at a moment, unix time."""

    at_s: float
    nodes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Nodes of all pools."""
        return sum(self.nodes.values())


@dataclass(frozen=True)
class Phases:
    """When a job began and ended on a cluster that had been idle, and that was idle afterwards; unix time."""

    began_s: float
    ended_s: float
    idle_timeout_s: float


@dataclass(frozen=True)
class Committed:
    """A unit whose commit was reported at ``at_s``, unix time, and the process that encoded it."""

    at_s: float
    encoder: int
    images: int


def autoscaling_facts(
    looks: Sequence[Look], phases: Phases, needed: Collection[str], grown: str
) -> dict[str, float]:
    """Figures of a job that needs the pools ``needed``, of which ``grown`` has most of the work.

    nodes_POOL: most at one moment; nodes_of_others: most of all pools that are not needed; nodes_before,
    nodes_left: before the job, and at the end. first_node_s, all_nodes_s: from the job's begin to the first
    and the last node of ``grown`` that was added. removed_extra_s: from its end, and the idle timeout after
    it, until no node is left for good; infinite where nodes are left.
    """
    pools = sorted({pool for look in looks for pool in look.nodes})
    most = {pool: max(look.nodes.get(pool, 0) for look in looks) for pool in pools}
    others = [sum(n for pool, n in look.nodes.items() if pool not in needed) for look in looks]
    reached = [look.at_s for look in looks if most[grown] and look.nodes[grown] == most[grown]]
    begun = [look.at_s for look in looks if look.nodes[grown] > 0]
    return {
        **{f"nodes_{pool.replace('-', '_')}": float(count) for pool, count in most.items()},
        "nodes_of_others": float(max(others)),
        "nodes_before": float(max((look.total for look in looks if look.at_s < phases.began_s), default=0)),
        "nodes_left": float(looks[-1].total),
        "first_node_s": min(begun, default=inf) - phases.began_s,
        "all_nodes_s": min(reached, default=inf) - phases.began_s,
        "removed_extra_s": _empty_from(looks) - phases.ended_s - phases.idle_timeout_s,
    }


def _empty_from(looks: Sequence[Look]) -> float:
    """The first look from which on there is no node."""
    empty_s = inf
    for look in reversed(looks):
        if look.total:
            break
        empty_s = look.at_s
    return empty_s


def steady_rate(commits: Sequence[Committed], encoders: int) -> float:
    """Images/s from when every encoder has committed a unit until the first of them commits its last.

    Commits at the beginning of that time do not count, the one at its end does: where encoders commit in
    step, a little less than all of them do. ValueError unless that many encoders committed two units or more.
    """
    times: dict[int, list[float]] = defaultdict(list)
    for commit in commits:
        times[commit.encoder].append(commit.at_s)
    if len(times) != encoders:
        raise ValueError(f"{len(times)} encoders have committed units, expected {encoders}")
    start_s, end_s = max(map(min, times.values())), min(map(max, times.values()))
    if end_s <= start_s:
        raise ValueError("an encoder had committed its last unit before another had committed its first")
    images = sum(commit.images for commit in commits if start_s < commit.at_s <= end_s)
    return images / (end_s - start_s)


def whole_rate(commits: Sequence[Committed], begun_s: float) -> float:
    """Images/s from the begin of the first unit to the commit of the last."""
    return sum(commit.images for commit in commits) / (max(commit.at_s for commit in commits) - begun_s)
