"""``ldm serve`` as a process of its own, and a collector: what arrives of a request and of a long job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.run_record import read_records
from tests.pipelines.serve.otlp_receiver import attributes, otlp_receiver

pytestmark = pytest.mark.faults_long

START_S, DEADLINE_S = 240.0, 120.0
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SMALL = {"num_cpus": 0.5, "threads": 1}


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def answers(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def replicas(spans: list[Any]) -> dict[str, Any]:
    """Deployment → the span of its replica."""
    handled = [span for span in spans if span.name.startswith("replica_handle_request ")]
    return {attributes(span)["deployment"]: span for span in handled}


def test_a_request_and_a_long_job_reach_the_collector(
    checkpoint_folders: dict[str, Path], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    config = {
        "ingress": {"num_cpus": 0.1, "max_ongoing": 1000},
        "sampler": SMALL,
        "decoder": SMALL,
        "limits": {"sizes_multiple_px": 4},
        "jobs": {"url": str(tmp_path / "jobs")},
    }
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "jobs.cli", "serve", str(checkpoint_folders["flow"])]
    command += ["--port", str(port), "--config", str(tmp_path / "serve.yaml")]
    with otlp_receiver() as receiver, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
        process = subprocess.Popen(command, env=os.environ | endpoint, start_new_session=True)
        try:
            wait_until(lambda: answers(http), START_S)
            (running,) = read_records(str(tmp_path / "jobs"))
            assert (running.command, running.shown_status) == ("serve", "running")
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "traced"}
            body = {"num_inference_steps": 5}
            assert http.post("/v1/images/generations", json=body, headers=headers).status_code == 200
            job = http.post("/v1/jobs", json=body).json()["id"]

            def of_the_client() -> list[Any]:
                return [span for span in receiver.spans() if span.trace_id.hex() == TRACE]

            def of_the_job() -> list[Any]:
                first = [span for span in receiver.spans() if span.name == "long job"]
                return [span for span in receiver.spans() if first and span.trace_id == first[0].trace_id]

            wait_until(lambda: any(span.parent_span_id.hex() == CALLER for span in of_the_client()))
            wait_until(lambda: {"ingress", "sampler", "decoder"} <= replicas(of_the_client()).keys())
            (root,) = [span for span in of_the_client() if span.parent_span_id.hex() == CALLER]
            assert root.name.startswith("proxy_http_request ")  # which is told of tracing, too
            ids = {span.span_id for span in of_the_client()}
            assert all(span.parent_span_id in ids for span in of_the_client() if span is not root)
            sampler = attributes(replicas(of_the_client())["sampler"])
            assert (sampler["request_id"], sampler["ldm.steps"]) == ("traced", 5)
            wait_until(lambda: {"sampler", "decoder"} <= replicas(of_the_job()).keys())
            (first,) = [span for span in of_the_job() if span.name == "long job"]
            assert attributes(first)["ldm.job"] == job and first.parent_span_id == b""
            names = {
                attributes(request.resource_spans[0].resource)["service.name"]
                for request in receiver.requests
            }
            assert names == {"ray-ldm"}
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(DEADLINE_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    (ended,) = read_records(str(tmp_path / "jobs"))
    assert (ended.run, ended.status) == (running.run, "done")
    assert [artifact.kind for artifact in ended.inputs] == ["checkpoint"]
