"""Whether a server of this machine can listen at an address."""

import socket

__all__ = ["why_it_cannot_listen"]


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
