"""What ``ray start`` calls before it starts a node of a cluster on loopback (``RAY_START_HOOK``).

Ray 2.60 takes 127.0.0.1, wherever it is given, for the address of the network card, and binds there or to
all addresses. Only where ``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`` is set does loopback stay loopback, as it is
on a Mac; but then ``ray start --address`` refuses to join. So the nodes have that variable, and this hook in
place of the refusal. Drivers need the variable alone.
"""

import time
from collections.abc import Callable
from typing import Any

__all__ = ["PATIENCE_S", "keep_loopback"]

PATIENCE_S = 120


def keep_loopback(parameters: Any, is_head: bool) -> None:
    """Let this ``ray start`` join a cluster on loopback, and end with the process that called it.

    It starts no server for ``ray://``, which no option of ``ray start`` can leave out, and does not give up
    after 30 s, which none can change: several nodes share one machine.
    """
    from ray._private import ray_constants, services
    from ray._private.utils import set_kill_on_parent_death_linux

    # Once for the refusal, and once because the refusal's switch also moves addresses off loopback.
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = lambda address=None: parameters.node_ip_address
    services.get_node = _patient(services.get_node)
    parameters.ray_client_server_port = None
    set_kill_on_parent_death_linux()  # type: ignore[no-untyped-call]  # Ray's own


def _patient(get_node: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    def wait_for_node(gcs_address: str, node_id: str) -> Any:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:  # it has not registered yet
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.5)

    return wait_for_node
