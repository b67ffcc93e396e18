"""What the processes of a cluster listen on."""

import ipaddress
from contextlib import suppress

import psutil

from jobs.local_cluster import LocalCluster

__all__ = ["beyond_loopback", "listening"]


def listening(cluster: LocalCluster) -> dict[str, list[tuple[str, int]]]:
    """Title of a process of the cluster → (address, port) on which it listens."""
    found: dict[str, list[tuple[str, int]]] = {}
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            addresses = [
                (entry.laddr.ip, entry.laddr.port)
                for entry in process.net_connections("inet")
                if entry.status == psutil.CONN_LISTEN
            ]
            if addresses:
                title = " ".join(process.cmdline())[:300]
                found.setdefault(f"{process.pid} {title}", []).extend(addresses)
    return found


def beyond_loopback(cluster: LocalCluster) -> list[tuple[str, str, int]]:
    return [
        (title, address, port)
        for title, places in listening(cluster).items()
        for address, port in places
        if not _is_loopback(address)
    ]


def _is_loopback(address: str) -> bool:
    """Also 127.0.0.1 as an address of IPv6, as gRPC has it, which Python 3.11 takes for another."""
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback
