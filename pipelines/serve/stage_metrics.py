"""What the stages of a server tell Prometheus, through Ray's own metrics: names begin with ``ldm_serve_``."""

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines.serve.stages import StagesObserver
from pipelines.serve.tickets import Observer, Reason

__all__ = ["RequestMetrics", "SamplerMetrics", "StageMetrics"]

WAIT_S = [0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300]
WORK_S = [0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800]
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0]


class SamplerMetrics(Observer):
    """Of the engines of one replica."""

    def __init__(self) -> None:
        self._queue = Histogram("ldm_serve_queue_seconds", "From accepted to the first step", WAIT_S)
        self._step = Histogram("ldm_serve_step_seconds", "Of a U-Net call", WORK_S)
        self._fill = Histogram("ldm_serve_batch_fill", "Rows of a U-Net call, of those that pay", SHARES)
        self._rows = Counter("ldm_serve_rows", "Rows of all U-Net calls")
        self._previews = Counter("ldm_serve_previews", "Previews drawn")
        self._preview_s = Counter("ldm_serve_preview_seconds", "Spent on drawing previews")
        self._cancelled = Counter("ldm_serve_cancellations", "Requests whose client left")
        self._refused = Counter("ldm_serve_refusals", "Requests that were refused", tag_keys=("reason",))
        self._left = Gauge("ldm_serve_sampler_seconds_left", "Of work in a sampler replica")

    def stepped(self, *, seconds: float, rows: int, room: int) -> None:
        self._step.observe(seconds)
        self._fill.observe(min(1.0, rows / room))
        self._rows.inc(rows)

    def started(self, *, waited_s: float) -> None:
        self._queue.observe(max(0.0, waited_s))

    def previewed(self, *, seconds: float) -> None:
        self._previews.inc()
        # A counter takes no 0, which a coarse clock can give.
        self._preview_s.inc(max(seconds, 1e-9))

    def refused(self, reason: Reason) -> None:
        self._refused.inc(tags={"reason": reason})

    def cancelled(self, *, steps: int) -> None:
        self._cancelled.inc()

    def left(self, seconds: float) -> None:
        """Of work, now."""
        self._left.set(seconds)


class StageMetrics:
    """Of a stage that does one thing after the other."""

    def __init__(self, stage: str) -> None:
        self._seconds = Histogram("ldm_serve_stage_seconds", "Of one request", WORK_S, tag_keys=("stage",))
        self._tags = {"stage": stage}

    def done(self, seconds: float) -> None:
        self._seconds.observe(seconds, tags=self._tags)


class RequestMetrics(StagesObserver):
    """Of the ingress; Ray Serve itself counts requests and their answers."""

    def __init__(self) -> None:
        self._retries = Counter(
            "ldm_serve_retries", "Stages run again since a replica died", tag_keys=("stage",)
        )

        self._refused = Counter(
            "ldm_serve_held_off", "Requests refused without asking the sampler, which was known to be full"
        )

    def retried(self, stage: str) -> None:
        self._retries.inc(tags={"stage": stage})

    def held_off(self) -> None:
        self._refused.inc()
