"""One of several processes that race for a lease: told what to do on standard input, answers on output.

acquire <url>   "held", or "lost: <the error>"
release         "released"
storm <url> <n> tries until it held the lease n times, each time for a moment; "done", or "two at once"
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ldm.errors import UserError
from ldm.storage import filesystem
from pipelines.lease import LeaseTiming, writer_lease

TIMING = LeaseTiming(renew_s=0.2, expire_s=2.0)


def storm(url: str, num_times: int) -> str:
    """Hold the lease so many times; a local file is there while anybody holds it."""
    store, root = filesystem(url)
    inside = Path(root) / "inside"
    for _ in range(num_times):
        while True:
            try:
                with writer_lease(store, root, "the dataset", TIMING):
                    inside.touch(exist_ok=False)
                    time.sleep(0.001)
                    inside.unlink()
                break
            except FileExistsError:
                return "two at once"
            except UserError:
                time.sleep(0.001)
    return "done"


if __name__ == "__main__":
    held = ExitStack()
    print("ready", flush=True)
    for line in sys.stdin:
        command, *given = line.split()
        if command == "release":
            held.close()
            print("released", flush=True)
            continue
        if command == "storm":
            print(storm(given[0], int(given[1])), flush=True)
            continue
        try:
            store, root = filesystem(given[0])
            held.enter_context(writer_lease(store, root, "the dataset", TIMING))
            print("held", flush=True)
        except UserError as error:
            print(f"lost: {error}", flush=True)
