"""How much memory this process takes in addition while something runs (Linux, glibc)."""

import ctypes
import re
from pathlib import Path

import psutil

__all__ = ["PeakRss"]

PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


class PeakRss:
    """Counts from the moment at which it is made."""

    def __init__(self) -> None:
        # What was freed and is still resident would be taken again without a sign of it.
        ctypes.CDLL(None).malloc_trim(0)
        self.before = psutil.Process().memory_info().rss
        # The kernel's own peak, so that nothing between two looks is missed; 5 makes it begin anew.
        Path("/proc/self/clear_refs").write_text("5")

    def growth_bytes(self) -> int:
        """The highest resident size since then, above the size at that moment."""
        found = PEAK.search(Path("/proc/self/status").read_text())
        assert found is not None
        return max(0, int(found[1]) * 1024 - self.before)
