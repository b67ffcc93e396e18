"""Panels of serve.json."""

from panels import NODES, ONLY, RATE, Panel, Row, gauge, mean, quantiles, rate

__all__ = ["SERVE"]


def _ingress(counter: str) -> str:
    return f'sum (rate({counter}{{{ONLY}, deployment="ingress"}}{RATE}))'


SERVE = [
    Row(
        "Requests",
        [
            Panel(
                "requests of the ingress",
                "reqps",
                [
                    (_ingress("ray_serve_deployment_request_counter_total"), "requests"),
                    (_ingress("ray_serve_deployment_error_counter_total"), "errors"),
                ],
                width=6,
            ),
            Panel(
                "refused",
                "reqps",
                [
                    (rate("ray_ldm_serve_refusals_total", "reason"), "sampler: {{reason}}"),
                    (rate("ray_ldm_serve_held_off_total"), "ingress, for a full sampler"),
                ],
                "429: more is asked for than can be done in time",
                6,
            ),
            Panel(
                "wait for the first step",
                "s",
                quantiles("ray_ldm_serve_queue_seconds"),
                "of accepted requests",
                6,
            ),
            Panel(
                "left and failed",
                "reqps",
                [
                    (rate("ray_ldm_serve_cancellations_total"), "client left"),
                    (rate("ray_ldm_serve_retries_total", "stage"), "again, {{stage}} died"),
                ],
                width=6,
            ),
        ],
    ),
    Row(
        "Sampler",
        [
            Panel("U-Net call", "s", quantiles("ray_ldm_serve_step_seconds"), width=6),
            Panel(
                "rows",
                "ops",
                [(rate("ray_ldm_serve_rows_total"), "rows/s")],
                "a guided image has two in a step",
                6,
            ),
            Panel(
                "fill of a call",
                "percentunit",
                [(mean("ray_ldm_serve_batch_fill"), "mean")],
                "of the rows that pay; low: there is room",
                6,
            ),
            Panel(
                "work left",
                "s",
                [(gauge("ray_ldm_serve_sampler_seconds_left"), "all replicas")],
                "divided by target_s: replicas that autoscaling wants",
                6,
            ),
        ],
    ),
    Row(
        "Other stages",
        [
            Panel("time of a request", "s", quantiles("ray_ldm_serve_stage_seconds", "stage")),
            Panel(
                "at work at once",
                "short",
                [(rate("ray_ldm_serve_stage_seconds_sum", "stage"), "{{stage}}")],
                "seconds of work in a second",
            ),
            Panel(
                "previews",
                "short",
                [
                    (rate("ray_ldm_serve_previews_total"), "drawn/s"),
                    (rate("ray_ldm_serve_preview_seconds_total"), "seconds of a sampler, each second"),
                ],
            ),
        ],
    ),
    Row(
        "Replicas",
        [
            Panel(
                "healthy",
                "short",
                [(gauge("ray_serve_deployment_replica_healthy", "deployment"), "{{deployment}}")],
            ),
            Panel(
                "waiting for a replica",
                "short",
                [(gauge("ray_serve_deployment_queued_queries", "deployment"), "{{deployment}}")],
            ),
            Panel(
                "nodes without metrics",
                "short",
                [("max (ldm_serve_nodes_without_metrics)", "nodes")],
                "only where Prometheus scrapes the server's own /metrics",
            ),
        ],
    ),
    NODES,
]
