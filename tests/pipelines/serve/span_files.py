"""Spans as Ray Serve's own exporter writes them: JSON after JSON, in a file of each process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Span", "spans_of"]


@dataclass(frozen=True)
class Span:
    """parent_id: empty where it begins a trace."""

    trace_id: str
    id: str
    parent_id: str
    name: str
    attributes: dict[str, Any]

    @property
    def stage(self) -> str:
        """Deployment that it is of, where it is what this did with the request; else empty."""
        if self.name.startswith("ingress "):
            return "ingress"
        return str(self.attributes["deployment"]) if self.name.startswith("replica_handle_request ") else ""

    @property
    def ours(self) -> dict[str, Any]:
        """Attributes that a stage has added."""
        prefix = "ldm."
        return {name[len(prefix) :]: v for name, v in self.attributes.items() if name.startswith(prefix)}


def spans_of(trace_id: str | None) -> list[Span]:
    """Of a trace that have ended by now, in the cluster that is connected; None: of all."""
    import ray

    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    found = [span for file in (logs / "serve/spans").glob("*.json") for span in _read(file.read_text())]
    return [span for span in found if trace_id in (None, span.trace_id)]


def _read(text: str) -> Iterator[Span]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text.rstrip()):
        try:
            span, at = decoder.raw_decode(text, at)
        except ValueError:
            return  # the last one is being written
        at += len(text[at:]) - len(text[at:].lstrip())
        context = span["context"]
        yield Span(
            trace_id=context["trace_id"].removeprefix("0x"),
            id=context["span_id"].removeprefix("0x"),
            parent_id=(span["parent_id"] or "").removeprefix("0x"),
            name=span["name"],
            attributes=span["attributes"],
        )
