"""Where servers of this machine can listen."""

import socket
from contextlib import ExitStack

__all__ = ["LOOPBACK", "free_ports", "why_it_cannot_listen"]

LOOPBACK = "127.0.0.1"


def why_it_cannot_listen(host: str, port: int) -> str:
    """Empty where it can, at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return str(error.strerror)
    return ""


def free_ports(count: int) -> list[int]:
    """Different ones of loopback at which nobody listens, at this moment."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in sockets]
