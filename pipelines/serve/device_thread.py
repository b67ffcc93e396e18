"""The threads of a replica: that in which torch is called gives way to those that answer."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

__all__ = ["device_thread", "switch_often"]

# Python's own is ten times that; a request needs the interpreter a dozen times before it is refused.
INTERVAL_S = 0.0005
# Where U-Net calls take all cores, a refusal would otherwise wait for its turn in each process on its way.
NICENESS = 10


def device_thread(name: str) -> ThreadPoolExecutor:
    """One thread for torch calls. On the CPU, threads that torch starts from it inherit its priority."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_give_way)


def switch_often() -> None:
    """For this process: Ray Serve, the event loop of the replica and torch have a thread each."""
    sys.setswitchinterval(INTERVAL_S)


def _give_way() -> None:
    if sys.platform == "linux":
        os.nice(NICENESS)  # Linux has it for threads, other systems for the whole process
