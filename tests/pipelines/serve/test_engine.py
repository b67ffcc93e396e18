import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.sampling import Trajectory
from pipelines.serve.engine import Engine
from pipelines.serve.step_costs import LatentShape, StepCosts
from pipelines.serve.tickets import Observer, Reason, Refused, Stopped, Ticket, TooLate, Work

SMALL, LARGE = (4, 8, 8), (4, 16, 16)
CONFIG = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


class Machine:
    """A U-Net that predicts the latent itself, and a clock that only its calls move on."""

    def __init__(self, seconds: Callable[[LatentShape, int], float], *, broken: Sequence[int] = ()) -> None:
        self.seconds, self.broken = seconds, broken
        self.now, self.calls = 0.0, list[list[int]]()

    def __call__(self, trajectories: Sequence[Trajectory]) -> None:
        seeds = [trajectory.seed for trajectory in trajectories]
        if set(seeds) & set(self.broken):
            raise RuntimeError("out of memory")
        self.calls.append(seeds)
        self.now += self.seconds(trajectories[0].shape, len(trajectories))
        for trajectory in trajectories:
            trajectory.advance(trajectory.latent)

    @property
    def steps(self) -> Counter[int]:
        """Taken for each seed."""
        return Counter(seed for call in self.calls for seed in call)


def _work(seed: int, num_steps: int = 3, *, shape: LatentShape = SMALL, **options: object) -> Work:
    return Work(
        start=lambda: _trajectory(seed, num_steps, shape), shape=shape, num_steps=num_steps, rows=1, **options
    )  # type: ignore[arg-type]


def _trajectory(seed: int, num_steps: int, shape: LatentShape = SMALL) -> Trajectory:
    return Trajectory(
        shape=shape,
        scheduler="ddim",
        scheduler_config=CONFIG,
        num_inference_steps=num_steps,
        guidance=1.0,
        seed=seed,
    )


def _alone(seed: int, num_steps: int) -> Tensor:
    trajectory = _trajectory(seed, num_steps)
    while not trajectory.done:
        trajectory.advance(trajectory.latent)
    return trajectory.latent


def _with_engine(
    machine: Machine,
    scenario: Callable[[Engine], Awaitable[None]],
    *,
    max_rows: int = 4,
    max_requests: int = 100,
    max_slowdown: float | None = None,
    observer: Observer | None = None,
) -> None:
    async def run() -> None:
        costs = StepCosts(machine.seconds, max_rows, long_s=math.inf)
        engine = Engine(
            machine,
            costs,
            max_requests=max_requests,
            max_slowdown=max_slowdown,
            observer=observer,
            clock=lambda: machine.now,
        )
        task = asyncio.create_task(engine.run())
        try:
            async with asyncio.timeout(20):
                await scenario(engine)
        finally:
            task.cancel()

    asyncio.run(run())


def _free_rows(shape: LatentShape, rows: int) -> float:
    return 1.0


def test_requests_of_different_lengths_share_calls_and_get_what_they_get_alone() -> None:
    machine = Machine(_free_rows)

    async def scenario(engine: Engine) -> None:
        lengths = {1: 2, 2: 5, 3: 3}
        tickets = {seed: await engine.submit(_work(seed, steps)) for seed, steps in lengths.items()}
        for seed, ticket in tickets.items():
            assert torch.equal(await ticket.done, _alone(seed, lengths[seed]))

    _with_engine(machine, scenario)
    assert len(machine.calls) == 5
    assert machine.steps == {1: 2, 2: 5, 3: 3}


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    machine = Machine(lambda _, rows: float(rows))  # no gain by batches

    async def scenario(engine: Engine) -> None:
        long = await engine.submit(_work(1, 50))
        await asyncio.sleep(0)
        short = await engine.submit(_work(2, 3))
        await short.done
        assert not long.done.done()
        await long.done

    _with_engine(machine, scenario)


def test_a_request_joins_between_two_steps_of_another() -> None:
    machine = Machine(_free_rows)

    async def scenario(engine: Engine) -> None:
        first = await engine.submit(_work(1, 20))
        async for update in first.updates():
            if update.step >= 3:
                break
        await (await engine.submit(_work(2, 2))).done
        await first.done

    _with_engine(machine, scenario)
    assert [1, 2] in [sorted(call) for call in machine.calls]
    assert len(machine.calls) == 20


def test_who_cannot_be_in_time_is_refused_at_once() -> None:
    machine = Machine(_free_rows)

    async def scenario(engine: Engine) -> None:
        await (await engine.submit(_work(1, 10, deadline_s=10.0))).done
        with pytest.raises(Refused) as refused:
            await engine.submit(_work(2, 10, deadline_s=9.0))
        assert refused.value.reason == "deadline"

    _with_engine(machine, scenario)
    assert set(machine.steps) == {1}


def test_who_would_make_another_late_is_refused() -> None:
    machine = Machine(lambda _, rows: float(rows))

    async def scenario(engine: Engine) -> None:
        accepted = await engine.submit(_work(1, 10, deadline_s=11.0))
        with pytest.raises(Refused) as refused:
            await engine.submit(_work(2, 2, deadline_s=3.0))
        assert refused.value.reason == "deadline" and refused.value.retry_after_s > 0
        await accepted.done

    _with_engine(machine, scenario)


def test_a_deadline_that_a_slower_machine_misses_ends_the_request() -> None:
    machine = Machine(_free_rows)

    async def scenario(engine: Engine) -> None:
        ticket = await engine.submit(_work(1, 10, deadline_s=12.0))
        machine.seconds = lambda *_: 5.0
        with pytest.raises(TooLate):
            await ticket.done

    _with_engine(machine, scenario)
    assert machine.steps[1] <= 4


def test_no_more_than_max_requests() -> None:
    async def scenario(engine: Engine) -> None:
        tickets = [await engine.submit(_work(seed)) for seed in (1, 2)]
        with pytest.raises(Refused, match="full"):
            await engine.submit(_work(3))
        await asyncio.gather(*(ticket.done for ticket in tickets))
        await asyncio.sleep(0.05)
        await (await engine.submit(_work(3))).done

    _with_engine(Machine(_free_rows), scenario, max_requests=2)


class Cancellations(Observer):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.reasons: list[Reason] = []

    def cancelled(self, *, steps: int) -> None:
        self.steps.append(steps)


def test_a_cancelled_request_takes_one_more_step_at_most_and_harms_nobody() -> None:
    machine, seen = Machine(_free_rows), Cancellations()

    async def scenario(engine: Engine) -> None:
        leaving, staying = await engine.submit(_work(1, 30)), await engine.submit(_work(2, 30))
        async for update in leaving.updates():
            if update.step >= 4:
                leaving.cancel()
                break
        steps = leaving.steps_taken
        assert torch.equal(await staying.done, _alone(2, 30))
        assert machine.steps[1] <= steps + 1

    _with_engine(machine, scenario, observer=seen)
    assert len(seen.steps) == 1 and seen.steps[0] <= 6


def test_a_client_whose_task_ends_is_as_good_as_a_cancelled_one() -> None:
    machine = Machine(_free_rows)

    async def scenario(engine: Engine) -> None:
        async def client() -> None:
            await (await engine.submit(_work(1, 1000))).done

        task = asyncio.create_task(client())
        while machine.steps[1] < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.05)
        assert engine.num_requests == 0

    _with_engine(machine, scenario)
    assert machine.steps[1] < 1000


def test_one_that_fails_does_not_take_others_with_it() -> None:
    machine = Machine(_free_rows, broken=[2])

    def no_start() -> Trajectory:
        raise ValueError("no such model")

    async def scenario(engine: Engine) -> None:
        works = [_work(1), _work(2), Work(start=no_start, shape=SMALL, num_steps=3, rows=1), _work(4)]
        tickets = [await engine.submit(work) for work in works]
        good, broken, unstarted, also_good = await asyncio.gather(
            *(ticket.done for ticket in tickets), return_exceptions=True
        )
        assert torch.equal(good, _alone(1, 3)) and torch.equal(also_good, _alone(4, 3))
        assert isinstance(broken, RuntimeError) and isinstance(unstarted, ValueError)

    _with_engine(machine, scenario)


def test_shapes_share_the_time_and_not_the_calls() -> None:
    machine = Machine(lambda shape, rows: 1.0 if shape == SMALL else 4.0)

    async def scenario(engine: Engine) -> None:
        small = await engine.submit(_work(1, 40))
        large = await engine.submit(_work(2, 40, shape=LARGE))
        await small.done
        large.cancel()

    _with_engine(machine, scenario)
    assert machine.steps[2] == pytest.approx(10, abs=2)
    assert all(len(call) == 1 for call in machine.calls)


def test_previews_come_at_the_steps_that_were_asked_for() -> None:
    async def scenario(engine: Engine) -> None:
        drawn: list[int] = []

        def preview(trajectory: Trajectory) -> NDArray[np.uint8]:
            drawn.append(trajectory.step_index)
            return np.full((1, 1, 3), trajectory.step_index, np.uint8)

        ticket = await engine.submit(_work(1, 12, preview_every=4, preview=preview))
        seen = [update async for update in ticket.updates()]
        assert seen[-1].step == 12 and all(update.num_steps == 12 for update in seen)
        shown = [int(update.preview[0, 0, 0]) for update in seen if update.preview is not None]
        assert drawn == [4, 8] and set(shown) <= {4, 8} and shown

    _with_engine(Machine(_free_rows), scenario)


def test_whoever_waits_when_the_engine_ends_is_told() -> None:
    async def run() -> None:
        machine = Machine(_free_rows)
        engine = Engine(machine, StepCosts(machine.seconds, 4, long_s=math.inf), clock=lambda: machine.now)
        task = asyncio.create_task(engine.run())
        ticket = await engine.submit(_work(1, 10**3))
        task.cancel()
        with pytest.raises(Stopped):
            await ticket.done
        with pytest.raises(Refused, match="draining"):
            await engine.submit(_work(2))

    asyncio.run(run())


def test_a_draining_engine_ends_what_it_has_and_takes_no_more() -> None:
    async def scenario(engine: Engine) -> None:
        ticket: Ticket = await engine.submit(_work(1, 5))
        await engine.drain()
        assert ticket.done.done() and not ticket.done.cancelled()
        with pytest.raises(Refused, match="draining"):
            await engine.submit(_work(2))

    _with_engine(Machine(_free_rows), scenario)


def test_fewer_are_accepted_while_something_else_slows_the_machine_down() -> None:
    """Alone a request takes a second a step, and by now 1.6: two would take 2.4 where 2 are allowed."""
    machine = Machine(lambda _, rows: 0.5 + 0.5 * rows)

    async def scenario(engine: Engine) -> None:
        first = await engine.submit(_work(1, 10))
        second = await engine.submit(_work(2, 10))
        await asyncio.gather(first.done, second.done)
        machine.seconds = lambda _, rows: 1.6 * (0.5 + 0.5 * rows)
        await (await engine.submit(_work(3, 60))).done
        await engine.submit(_work(4, 10))
        with pytest.raises(Refused, match="full"):
            await engine.submit(_work(5, 10))

    _with_engine(machine, scenario, max_slowdown=2.0)


def test_nobody_is_slowed_down_by_more_than_is_allowed() -> None:
    """A call of four rows takes 2.5 times one of a single row: with a slowdown of 2, three may share it."""

    async def scenario(engine: Engine) -> None:
        tickets = [await engine.submit(_work(seed, 10)) for seed in (1, 2, 3)]
        with pytest.raises(Refused, match="full"):
            await engine.submit(_work(4, 10))
        with pytest.raises(Refused, match="full"):
            await engine.submit(_work(5, 10, shape=LARGE))
        await asyncio.gather(*(ticket.done for ticket in tickets))
        await asyncio.sleep(0.05)
        await (await engine.submit(_work(4, 10))).done

    _with_engine(Machine(lambda _, rows: 0.5 + 0.5 * rows), scenario, max_slowdown=2.0)
