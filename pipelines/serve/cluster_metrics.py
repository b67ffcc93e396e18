"""All stages' metrics as one text: Ray collects them on every node, and this reads them there."""

import asyncio

import httpx
import ray

__all__ = ["cluster_metrics"]

# Ray puts its own name before ours.
PREFIX = "ray_ldm_serve_"
TIMEOUT_S = 5.0


async def cluster_metrics() -> str:
    """In Prometheus' text form. A node that does not answer has no lines, and is counted."""
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray's own
        if node["Alive"]
    ]
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        texts = await asyncio.gather(*(_text(client, url) for url in urls))
    silent = sum(text is None for text in texts)
    merged = _merged([text for text in texts if text is not None])
    name = "ldm_serve_nodes_without_metrics"
    return f"{merged}# HELP {name} Nodes that did not answer\n# TYPE {name} gauge\n{name} {silent}\n"


async def _text(client: httpx.AsyncClient, url: str) -> str | None:
    try:
        response = await client.get(url)
    except httpx.HTTPError:
        return None
    return response.text if response.is_success else None


def _merged(texts: list[str]) -> str:
    """Samples of all texts by metric, each of which may be described once only."""
    descriptions: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("#"):
                name = line.split(" ", 3)[2] if line.count(" ") > 1 else name
                if line not in descriptions.setdefault(name, []) and len(descriptions[name]) < 2:
                    descriptions[name].append(line)
            elif name.startswith(PREFIX):
                samples.setdefault(name, []).append(line)
    lines = [line for name in samples for line in (*descriptions[name], *samples[name])]
    return "".join(f"{line}\n" for line in lines)
