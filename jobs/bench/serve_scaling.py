"""How soon stages get and lose replicas, and that each moves alone; with a plot of replicas over time."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import httpx
import psutil

from jobs.bench.serve_model import bench_server
from pipelines.serve.config import SamplerPool, StagePool

__all__ = ["scaling"]

STAGES = ("sampler", "decoder")
LOOK_EVERY_S = 0.2
DOWN_DELAY_S = 10.0
TIMEOUT_S = 300.0
# CPU seconds of a replica after it began to run: it has work.
WORKING_CPU_S = 0.5
BURST_S, HEAVY_S, IDLE_S = 30.0, 25.0, 10.0
SMALL, LARGE = {"num_inference_steps": 100}, {"num_inference_steps": 1, "size": "1024x1024"}


@dataclass
class Look:
    """``at_s``; for each stage the replicas that it is to have, that start and that run."""

    at_s: float
    target: dict[str, int]
    running: dict[str, int]


@dataclass
class Watch:
    """Looks at the stages while something else goes on."""

    begin: float = field(default_factory=time.perf_counter)
    looks: list[Look] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        self.marks[name] = time.perf_counter() - self.begin

    def first(self, after: str, stage: str, condition: Callable[[Look], bool]) -> float:
        """Seconds from a mark to the first look of which ``condition`` holds; infinite if it never does."""
        start = self.marks[after]
        return min(
            (look.at_s - start for look in self.looks if look.at_s > start and condition(look)), default=inf
        )


def scaling(preset: str, side: int, plot: Path) -> dict[str, float]:
    """A burst, a load for one stage, one for the other; idle time between. Needs a connected Ray."""
    stage = {
        "threads": 1,
        "min_replicas": 0,
        "max_replicas": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": DOWN_DELAY_S,
    }
    sampler = SamplerPool.model_validate(stage | {"min_replicas": 1, "target_s": 5.0, "max_ongoing": 16})
    decoder = StagePool.model_validate(stage | {"target_s": 2.0})
    with bench_server(preset, side, sampler, decoder) as url:
        return asyncio.run(_scaling(url, plot))


async def _scaling(url: str, plot: Path) -> dict[str, float]:
    watch, working = Watch(), asyncio.Event()
    watching = asyncio.create_task(_look(watch))
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as http:
        await _load(http, SMALL, 1, 5.0)
        watch.mark("burst")
        seen = asyncio.create_task(_second_works(watch, working))
        await _load(http, SMALL, 48, BURST_S)
        watch.mark("idle")
        await asyncio.sleep(DOWN_DELAY_S + IDLE_S)
        watch.mark("decoder load")
        # So few that their single steps are less work than `target_s` of a sampler, even all at once.
        await _load(http, LARGE, 4, HEAVY_S)
        # Else what the decoders were given for the load before would still be there.
        await asyncio.sleep(DOWN_DELAY_S + IDLE_S)
        watch.mark("sampler load")
        await _load(http, SMALL, 16, HEAVY_S)
        watch.mark("end")
        seen.cancel()
    if watching.done():
        watching.result()  # what ended it
    watching.cancel()
    _draw(watch, plot)
    return {
        "scale_decision_s": watch.first("burst", "sampler", lambda look: look.target["sampler"] > 1),
        "scale_running_s": watch.first("burst", "sampler", lambda look: look.running["sampler"] > 1),
        "scale_up_s": watch.marks.get("second works", inf) - watch.marks["burst"],
        "scale_to_zero_extra_s": watch.first("idle", "sampler", lambda look: look.target["decoder"] == 0)
        - DOWN_DELAY_S,
        **_peaks(watch, "decoder load", "sampler load", "decoder_heavy"),
        **_peaks(watch, "sampler load", "end", "sampler_heavy"),
    }


def _peaks(watch: Watch, start: str, end: str, name: str) -> dict[str, float]:
    looks = [look for look in watch.looks if watch.marks[start] + 2 < look.at_s < watch.marks[end]]
    return {f"{name}_{stage}s": float(max(look.target[stage] for look in looks)) for stage in STAGES}


async def _load(http: httpx.AsyncClient, body: Mapping[str, object], clients: int, seconds: float) -> None:
    """So many clients, each of which asks again as soon as it has an answer."""
    end = time.perf_counter() + seconds

    async def client(seed: int) -> None:
        while time.perf_counter() < end:
            answer = await http.post("/v1/images/generations", json={**body, "class_label": seed % 10})
            if answer.status_code != 200:
                await asyncio.sleep(0.2)

    await asyncio.gather(*(client(seed) for seed in range(clients)))


async def _look(watch: Watch) -> None:
    from ray import serve

    while True:
        status = await asyncio.to_thread(serve.status)
        target, running = dict.fromkeys(STAGES, 0), dict.fromkeys(STAGES, 0)
        for application in status.applications.values():
            for name in STAGES:
                # Its keys are text, whatever its type says.
                states = {str(state): n for state, n in application.deployments[name].replica_states.items()}
                running[name] = states.get("RUNNING", 0)
                target[name] = running[name] + states.get("STARTING", 0)
        watch.looks.append(Look(time.perf_counter() - watch.begin, target, running))
        await asyncio.sleep(LOOK_EVERY_S)


async def _second_works(watch: Watch, working: asyncio.Event) -> None:
    """Note when the sampler replica that came last has worked after its start."""
    idle_cpu_s: dict[int, float] = {}
    while not working.is_set():
        await asyncio.sleep(LOOK_EVERY_S)
        if not watch.looks or watch.looks[-1].running["sampler"] < 2:
            continue
        for process in await asyncio.to_thread(_samplers):
            used_s = sum(process.cpu_times()[:2])
            before_s = idle_cpu_s.setdefault(process.pid, used_s)
            newest = max(idle_cpu_s)
            if process.pid == newest and used_s - before_s > WORKING_CPU_S and len(idle_cpu_s) > 1:
                watch.mark("second works")
                working.set()


def _samplers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("ServeReplica" in part and "sampler" in part for part in process.info["cmdline"] or ())
    ]


def _draw(watch: Watch, plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3), layout="constrained")
    times = [look.at_s for look in watch.looks]
    for offset, stage in enumerate(STAGES):
        shift = 0.03 * offset
        (line,) = axes.step(
            times, [look.running[stage] + shift for look in watch.looks], where="post", label=stage
        )
        axes.step(
            times, [look.target[stage] + shift for look in watch.looks], where="post", linestyle=":",
            color=line.get_color(), label=f"{stage}, with those that start",
        )  # fmt: skip
    for name, at_s in watch.marks.items():
        axes.axvline(at_s, color="0.7", linewidth=0.8)
        axes.text(at_s, axes.get_ylim()[1], f" {name}", rotation=90, va="top", fontsize=7)
    axes.set(xlabel="seconds", ylabel="replicas", yticks=range(4))
    axes.legend(loc="upper right", fontsize=7)
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)
