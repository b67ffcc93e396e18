"""How long a stage takes on so many nodes, and how few nodes keep a deadline."""

from bisect import bisect_left
from dataclasses import dataclass
from math import inf

__all__ = ["HOUR_S", "Interruptions", "Pace", "fewest_nodes"]

HOUR_S = 3600


@dataclass(frozen=True)
class Interruptions:
    """What preemptions cost: each the work of ``images`` again, and ``restart_s``.

    stops_all: all devices stop and do it together, as in a training; else the one that is lost, alone.
    """

    per_device_hour: float
    restart_s: float
    images: float
    stops_all: bool


@dataclass(frozen=True)
class Pace:
    """A stage's work and speed, whatever the number of nodes.

    images_per_s: of one device alone. efficiency: of each of several. start_s: until they work.
    """

    images: int
    images_per_s: float
    devices_per_node: int
    efficiency: float
    start_s: float = 0.0
    interruptions: Interruptions | None = None

    def device_images_per_s(self, nodes: int) -> float:
        """Of one among the devices of so many nodes, while it works."""
        devices = nodes * self.devices_per_node
        return self.images_per_s * (1 if devices == 1 else self.efficiency)

    def images_per_s_of(self, nodes: int) -> float:
        """Of all devices, while they work."""
        return nodes * self.devices_per_node * self.device_images_per_s(nodes)

    def lost_share(self, nodes: int) -> float:
        """Of the time that the devices have; 1 and above: there is no progress.

        Per device-hour p a device is lost, and with it its node: a training is stopped p·nodes times an hour.
        """
        lost = self.interruptions
        if lost is None:
            return 0.0
        events = lost.per_device_hour * (nodes if lost.stops_all else 1)
        speed = self.images_per_s_of(nodes) if lost.stops_all else self.device_images_per_s(nodes)
        return events * (lost.images / speed + lost.restart_s) / HOUR_S

    def hours(self, nodes: int) -> float:
        """From the start to the end; infinite where preemptions leave nothing."""
        useful = 1 - self.lost_share(nodes)
        if useful <= 0:
            return inf
        return (self.start_s + self.images / (self.images_per_s_of(nodes) * useful)) / HOUR_S

    def device_hours(self, nodes: int) -> float:
        """Of all devices, what is lost included."""
        return nodes * self.devices_per_node * self.hours(nodes)


def fewest_nodes(pace: Pace, deadline_h: float, most_nodes: int) -> int | None:
    """The least number that keeps the deadline, where more nodes never take longer; None if none does."""

    def in_time(nodes: int) -> bool:
        return pace.hours(nodes) <= deadline_h

    if in_time(1):
        return 1
    # One device alone has no loss by scaling, so that two may take longer; from there on time only falls.
    counts = range(2, most_nodes + 1)
    found = bisect_left(counts, True, key=in_time)
    return counts[found] if found < len(counts) else None
