"""How long a thread of a replica may keep the interpreter from the others."""

import sys

__all__ = ["switch_often"]

# Python's own is ten times that; a request needs the interpreter a dozen times before it is refused.
INTERVAL_S = 0.0005


def switch_often() -> None:
    """For this process: Ray Serve, the event loop of the replica and torch have a thread each."""
    sys.setswitchinterval(INTERVAL_S)
