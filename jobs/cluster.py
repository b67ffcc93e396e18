"""Connecting a job to a Ray cluster: one that runs already, or one of its own on this machine."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.current_run import cluster_is_there
from ldm.errors import UserError
from pipelines.json_logs import name_records, ray_options

__all__ = ["ClusterConfig", "connected"]

CONNECT_TIMEOUT_S = 5.0


class ClusterConfig(BaseModel):
    """Which Ray cluster a job runs on, and the size of one that it starts itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        None,
        description="HOST:PORT or ray://HOST:PORT of a running cluster, or 'auto'; "
        "without it RAY_ADDRESS, else a cluster of this job's own",
    )
    num_cpus: int | None = Field(None, ge=1, description="CPUs of an own cluster; without it all of them")
    num_gpus: int | None = Field(None, ge=0, description="logical GPUs of an own cluster; without it all")
    object_store_memory_bytes: int | None = Field(
        None, ge=80_000_000, description="shared memory of an own cluster's object store"
    )
    worker_logs: bool = Field(False, description="show what the workers print")

    @model_validator(mode="after")
    def _sizes_are_for_an_own_cluster(self) -> "ClusterConfig":
        sizes = (self.num_cpus, self.num_gpus, self.object_store_memory_bytes)
        if self.address is not None and any(size is not None for size in sizes):
            raise ValueError(
                "num_cpus, num_gpus and object_store_memory_bytes are for a cluster that "
                "the job starts itself; leave them out, or leave out address"
            )
        return self


@contextmanager
def connected(config: ClusterConfig, *, worker_logs: bool = False, spare_cpus: int = 0) -> Iterator[None]:
    """Ray is connected inside the block; what this started is shut down after it.

    ``worker_logs`` shows what the workers print, whatever the config says: a training's progress.
    ``spare_cpus``: logical CPUs beyond the machine's, for what mostly waits, where a cluster is started
    and the config does not say how many.
    A Ray that is already initialised is used as it is and left running. Raises ``UserError`` if
    the cluster at ``config.address`` cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train would print every line twice: as it is and as a log record.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    if ray.is_initialized():
        cluster_is_there()
        yield
        return
    _start(config, config.worker_logs or worker_logs, spare_cpus)
    try:
        _keep_quiet()
        cluster_is_there()
        yield
        cluster_is_there()  # it may have grown
    finally:
        ray.shutdown()
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)


def _start(config: ClusterConfig, worker_logs: bool, spare_cpus: int) -> None:
    import ray

    _drop_token_notice()
    logs = ray_options()
    if logs:
        name_records()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        dashboard_port = _own_dashboard_port()
        ray.init(
            address="local",  # else Ray would join any cluster that was last started on this machine
            num_cpus=config.num_cpus or _machine_cpus() + spare_cpus,
            num_gpus=config.num_gpus,
            object_store_memory=config.object_store_memory_bytes,
            include_dashboard=worker_logs,
            dashboard_port=dashboard_port,
            logging_level=logging.WARNING,
            log_to_driver=worker_logs,
            **logs,
        )
        return
    _check_reachable(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=worker_logs, **logs)
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(address, str(error)) from error


def _machine_cpus() -> int:
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())  # inside a container: the container's


def _own_dashboard_port() -> int:
    """A free port for the dashboard, made known to every process of the cluster about to start.

    Ray Train's cleaner asks a dashboard once a second whether its controller lives, and removes the
    workers if not. Left to find one, it takes that of any other Ray on this machine, which knows
    nothing of the controller: two trainings on one machine then end each other. So the address is set
    even where no dashboard is started; the cleaner then asks in vain, and leaves things as they are.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    return port


def _check_reachable(address: str) -> None:
    """Knock at a HOST:PORT address: left alone, Ray goes on trying for minutes."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unreachable(address, str(error)) from error
    if host is None or port is None:
        return  # 'auto' and 'local', which Ray resolves itself
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster at address '{address}' ({reason})",
        do="start one with `ray start --head`, or leave the address out to use this machine",
    )


def _keep_quiet() -> None:
    """Leave stderr to the job: Ray Data logs to its own file, bars are drawn for a terminal only.

    A failure's traceback is not lost with it: the exception that reaches the driver holds it.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.CRITICAL)


def _drop_token_notice() -> None:
    # That token authentication is on, which is how it should be, is not news in every run.
    notices = logging.getLogger("ray._private.authentication.authentication_token_setup")
    notices.addFilter(_is_not_token_notice)


def _is_not_token_notice(record: logging.LogRecord) -> bool:
    return "Token authentication is enabled" not in record.getMessage()
