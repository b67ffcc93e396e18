"""Traces of requests over the stages: Ray Serve's own spans, sent by OTLP, with what our stages know beside.

Ray Serve makes a span where its proxy, a router and a replica have a request, and hands the trace from stage
to stage. Its proxy goes on with the client's ``traceparent``, but is told of tracing by its environment alone
(2.60): so the ingress has a span of its own, that goes on where the proxy did not. A stage adds to its
replica's span. Off, all of this is a look at a span that records nothing.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ldm.errors import UserError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span
    from ray.serve.schema import TracingConfig

__all__ = [
    "EXPORTER",
    "current_span",
    "describe",
    "job_span",
    "request_span",
    "span_processors",
    "tracing_from_environment",
]

LOG = logging.getLogger("ldm.serve")
# How Ray Serve finds `span_processors`, and by which variables its processes do that were told nothing else.
EXPORTER = "pipelines.serve.tracing:span_processors"
RAY_EXPORTER, RAY_RATIO = "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH", "RAY_SERVE_TRACING_SAMPLING_RATIO"
# OpenTelemetry's own variables: that of traces counts before the general one.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
RATIO = "OTEL_TRACES_SAMPLER_ARG"


def tracing_from_environment() -> "TracingConfig | None":
    """For ``serve.start``; None where no endpoint is set: Ray Serve's own variables count then.

    Sets those variables for the processes of a cluster that is about to be started here. UserError where the
    exporter is not installed, or cannot do what OpenTelemetry's variables say.
    """
    from ray.serve.schema import TracingConfig

    if not _endpoint():
        return None
    if find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        raise UserError(
            f"{_endpoint()} is set, and the exporter is not installed",
            do="pip install 'ray-ldm[tracing]', or unset it",
        )
    for name in PROTOCOLS:
        if os.environ.get(name, PROTOCOL) != PROTOCOL:
            raise UserError(f"{name} is {os.environ[name]}", allowed=PROTOCOL)
    ratio = _ratio()
    for name, value in (("OTEL_SERVICE_NAME", "ray-ldm"), (RAY_EXPORTER, EXPORTER), (RAY_RATIO, f"{ratio}")):
        os.environ.setdefault(name, value)
    return TracingConfig(enabled=True, exporter_import_path=EXPORTER, sampling_ratio=ratio)


def span_processors() -> "list[SpanProcessor]":
    """Called by Ray Serve in each of its processes: they send spans in the background, to the endpoint."""
    if not _endpoint():
        LOG.warning("traces are on, and this node has none of %s: they are lost", ", ".join(ENDPOINTS))
        return []
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def current_span() -> "Span":
    """Of the request that this is done for."""
    return trace.get_current_span()


def describe(span: "Span", **attributes: float | str) -> None:
    """Put them on it as ``ldm.<name>``."""
    if span.is_recording():
        span.set_attributes({f"ldm.{name}": value for name, value in attributes.items()})


@contextmanager
def request_span(method: str, path: str, headers: Mapping[str, str], request_id: str) -> "Iterator[Span]":
    """Around all that the ingress does for a request."""
    attributes = {"request_id": request_id, "http.request.method": method, "url.path": path}
    with trace.get_tracer("ldm.serve").start_as_current_span(
        f"ingress {method}", context=_parent(headers), kind=trace.SpanKind.SERVER, attributes=attributes
    ) as span:
        yield span


def job_span(job_id: str) -> "AbstractContextManager[Span]":
    """Around a long job, for whose stages there is no request."""
    tracer = trace.get_tracer("ldm.serve")
    return tracer.start_as_current_span("long job", attributes={"ldm.job": job_id})


def _parent(headers: Mapping[str, str]) -> "Context | None":
    """The client's span, where what is current here is not of its trace; None: what is current."""
    if "traceparent" not in headers:
        return None
    given = TraceContextTextMapPropagator().extract(headers)
    told = trace.get_current_span(given).get_span_context()
    is_gone_on_with = told.trace_id == current_span().get_span_context().trace_id
    return given if told.is_valid and not is_gone_on_with else None


def _endpoint() -> str:
    """The variable that is set; empty where none is."""
    return next((name for name in ENDPOINTS if os.environ.get(name)), "")


def _ratio() -> float:
    """Share of the requests without a ``traceparent`` that are traced."""
    given = os.environ.get(RATIO, "1")
    try:
        ratio = float(given)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise UserError(f"{RATIO} is {given!r}", allowed="a share from 0 to 1")
    return ratio
