"""Where traces are sent, and what is refused; test_server.py has the traces themselves."""

from importlib import import_module

import pytest
from opentelemetry.sdk.trace import TracerProvider

from ldm.errors import UserError
from pipelines.serve import tracing
from tests.pipelines.serve.otlp_receiver import attributes, otlp_receiver

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *tracing.ENDPOINTS,
        *tracing.PROTOCOLS,
        tracing.RATIO,
        tracing.RAY_EXPORTER,
        tracing.RAY_RATIO,
        "OTEL_SERVICE_NAME",
    ):
        # Set first, so that what the code sets is undone, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_spans_arrive_by_otlp_under_the_name_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_receiver() as receiver:
        monkeypatch.setenv(ENDPOINT, receiver.url)
        config = tracing.tracing_from_environment()
        assert config is not None
        module, name = config.exporter_import_path.split(":")
        (processor,) = getattr(import_module(module), name)()
        provider = TracerProvider()
        provider.add_span_processor(processor)
        with provider.get_tracer("test").start_as_current_span("outer"):
            tracing.describe(tracing.current_span(), steps=6, queue_s=0.5)
        provider.shutdown()
    (request,) = receiver.requests
    assert attributes(request.resource_spans[0].resource)["service.name"] == "ray-ldm"
    (span,) = receiver.spans()
    assert (span.name, attributes(span)) == ("outer", {"ldm.steps": 6, "ldm.queue_s": 0.5})


def test_off_unless_an_endpoint_is_set() -> None:
    assert tracing.tracing_from_environment() is None
    assert tracing.span_processors() == []
    assert not tracing.current_span().is_recording()
    tracing.describe(tracing.current_span(), steps=6)


def test_all_are_traced_or_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    config = tracing.tracing_from_environment()
    assert config is not None and config.enabled and config.sampling_ratio == 1.0
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    config = tracing.tracing_from_environment()
    assert config is not None and config.sampling_ratio == 0.25


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_TRACES_SAMPLER_ARG", "2", "is '2'; allowed: a share from 0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "all", "is 'all'; allowed: a share from 0 to 1"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "is grpc; allowed: http/protobuf"),
    ],
)
def test_what_cannot_be_done_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} {said}"):
        tracing.tracing_from_environment()
