"""``ldm serve``: the HTTP API and its page, with every stage on this machine or on a cluster."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from jobs.haproxy import haproxy
from jobs.listening import why_it_cannot_listen
from ldm.errors import UserError
from pipelines.serve.config import ModelSource, ServeConfig, ServeOptions

if TYPE_CHECKING:
    from ray.serve.schema import TracingConfig

    from pipelines.serve.application import Checked

__all__ = ["ServeJob", "serving"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Stages mostly wait: with less, they would not all start on a small machine.
SPARE_CPUS = 4
APPLICATION = "ray-ldm"
DRAIN_POLL_S = 0.2


class ServeJob(ServeOptions, JobConfig):  # type: ignore[misc]  # both freeze, and forbid
    """Serve MODEL over HTTP: OpenAI's image API, long jobs, and a page at /.

    MODEL is a checkpoint of ldm train, or a diffusers folder. Runs until it is interrupted, and ends what is
    on its way then. docs/serving.md describes the API.
    """

    model: CliPositionalArg[Path] = Field(description="checkpoint of ldm train, or a diffusers folder")
    name: str = Field("default", description="by which requests name the model")
    more_models: dict[str, ModelSource] = Field({}, description="others, by name, best in a YAML file")
    host: str = "127.0.0.1"
    port: PositiveInt = 8000
    haproxy: bool = Field(
        False,
        description="Ray Serve's HAProxy in front, which takes less of the CPU; its statistics, on a port of "
        "its own, are open to whoever reaches this machine",
    )
    open_to_all: bool = Field(False, description="allow an address that others reach without API keys")
    cluster: ClusterConfig = ClusterConfig()

    def run(self) -> dict[str, object]:
        """Serve; the address, when it is over."""
        from pipelines.serve.application import Checked
        from pipelines.serve.tracing import tracing_from_environment

        checked, tracing = Checked(self.served), tracing_from_environment()
        self._check_open(checked)
        url = f"http://{self.host}:{self.port}"
        front = haproxy(self.cluster) if self.haproxy else nullcontext()
        with front, serving(checked, self.cluster, self.host, self.port, tracing):
            print(f"serving {self.name} at {url} (end it with Ctrl+C)", flush=True)
            _wait_for_signal()
            print("ending what is on its way", flush=True)
        return {"url": url}

    @property
    def served(self) -> ServeConfig:
        """What goes to Ray Serve."""
        options = {name: getattr(self, name) for name in ServeOptions.model_fields}
        models = {self.name: ModelSource(folder=self.model), **self.more_models}
        return ServeConfig(models=models, **options)

    def _check_open(self, checked: "Checked") -> None:
        if checked.keys.is_open and self.host not in LOOPBACK and not self.open_to_all:
            raise UserError(
                f"no API keys, and {self.host} is an address that others reach",
                allowed=f"without keys: {', '.join(LOOPBACK)}",
                do="give --access.key-file or LDM_API_KEYS; or --open-to-all, if the network is yours alone",
            )


@contextmanager
def serving(
    checked: "Checked",
    cluster: ClusterConfig,
    host: str,
    port: int,
    tracing: "TracingConfig | None" = None,
) -> Iterator[None]:
    """The server is up inside the block, and what is on its way is ended after it.

    UserError where the port is taken, or where a stage cannot start.
    """
    _check_port(host, port)
    with connected(cluster, spare_cpus=SPARE_CPUS):
        from ray import serve

        from pipelines.serve.application import application

        serve.start(http_options={"host": host, "port": port}, tracing_config=tracing)
        try:
            serve.run(application(checked), name=APPLICATION, route_prefix="/")
            try:
                yield
            finally:
                _drain()
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's own


def _drain() -> None:
    """Every ingress takes no more work, and what is on its way is answered.

    Ray Serve ends all stages of an application together: a request would lose those that it still needs.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from pipelines.serve.application import DRAIN_S

    ingress, end = serve.get_app_handle(APPLICATION), time.monotonic() + DRAIN_S
    # There may be no ingress any more, or one that died has nothing on its way.
    with suppress(RayServeException):
        while time.monotonic() < end:
            left = ingress.broadcast("drain").results(timeout_s=DRAIN_S, return_exceptions=True)
            if not any(count for count in left if isinstance(count, int)):
                return
            time.sleep(DRAIN_POLL_S)


def _check_port(host: str, port: int) -> None:
    if reason := why_it_cannot_listen(host, port):
        raise UserError(f"cannot serve at {host}:{port} ({reason})", do="give another --port")


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    # Whoever does not want to wait for what is on its way interrupts again.
    signal.signal(signal.SIGINT, signal.default_int_handler)
