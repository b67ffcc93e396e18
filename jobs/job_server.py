"""A cluster's job server: where it is, whether it asks for a token, and whether it may be used without."""

import ipaddress
import os
import socket
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from jobs.ray_token import find_token
from ldm.errors import UserError

if TYPE_CHECKING:
    from jobs.job_client import JobClient

__all__ = ["JobServer"]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PROBE_TIMEOUT_S = 10.0
OPEN, GUARDED = (200,), (401, 403)


class JobServer(BaseModel, frozen=True, extra="forbid"):
    """Options of every command that talks to a job server."""

    address: str | None = Field(
        None,
        description="http:// or https:// URL of the cluster's job server, its dashboard; without it "
        f"RAY_API_SERVER_ADDRESS, else {DEFAULT_ADDRESS}",
    )
    insecure: bool = Field(False, description="also use a server of another machine that asks for no token")

    def connect(self) -> "JobClient":
        """The server's client, with the token if the server asks for one.

        UserError where there is none, it refuses the token, or it asks for none and is not this machine's.
        """
        url = self.url
        guarded = asks_for_token(url)
        if not guarded and not self.insecure and not is_loopback(url):
            raise UserError(
                f"{url} asks for no token: anyone who reaches it runs what he likes there",
                do="start its cluster with RAY_AUTH_MODE=token, or reach it through a tunnel of your own; "
                "--insecure if its network is yours alone",
            )
        token = _require_token(url) if guarded else None
        if token and url.startswith("http:") and not is_loopback(url):
            print(f"note: the token goes to {url} without TLS", file=sys.stderr)
        from jobs.job_client import JobClient

        return JobClient(url, token)

    @property
    def url(self) -> str:
        """The server's URL, without a slash at its end."""
        url = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            good = False
        if not good:
            raise UserError(f"address is {url!r}", allowed="http://HOST:PORT or https://HOST[:PORT]")
        return url.rstrip("/")


def asks_for_token(url: str) -> bool:
    """Whether the jobs API there refuses who has no token. UserError where no job server answers."""
    import httpx

    try:
        status = httpx.get(f"{url}/api/jobs/", timeout=PROBE_TIMEOUT_S, follow_redirects=False).status_code
    except httpx.HTTPError as error:
        raise UserError(
            f"no job server at {url} ({error})",
            do="give the address of the cluster's dashboard, such as http://127.0.0.1:8265",
        ) from error
    if status not in (*OPEN, *GUARDED):
        raise UserError(
            f"{url} is no job server: it answers {status}", do="give the address of the cluster's dashboard"
        )
    return status in GUARDED


def is_loopback(url: str) -> bool:
    """Whether all addresses of the URL's host are this machine's alone."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _require_token(url: str) -> str:
    token = find_token()
    if token is None:
        raise UserError(
            f"{url} asks for a token, and there is none",
            do="set RAY_AUTH_TOKEN_PATH to a file (mode 600) with the cluster's token",
        )
    return token
