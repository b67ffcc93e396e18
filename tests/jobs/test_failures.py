"""A user error is found inside what Ray wraps it in; a handled one is not."""

from collections.abc import Callable

import pytest

from jobs.failures import find_user_error
from ldm.errors import UserError

MISTAKE = "no class 'owl'; allowed: cat, dog"


def mistake() -> None:
    raise UserError("no class 'owl'", allowed="cat, dog")


def handled_mistake() -> None:
    try:
        mistake()
    except UserError:
        raise RuntimeError("disk full")  # noqa: B904 - without a declared cause, which is the point


def run_task(body: Callable[[], None]) -> None:
    import ray

    ray.get(ray.remote(body).remote())


def run_constructor(body: Callable[[], None]) -> None:
    import ray

    class Encoder:
        def __init__(self) -> None:
            body()

        def ready(self) -> bool:
            return True

    ray.get(ray.remote(Encoder).remote().ready.remote())


def run_dataset(body: Callable[[], None]) -> None:
    import ray.data

    def encode(row: dict[str, int]) -> dict[str, int]:
        body()
        return row

    ray.data.range(1).map(encode).materialize()


@pytest.mark.parametrize("run", [run_task, run_constructor, run_dataset])
@pytest.mark.usefixtures("ray_cluster")
def test_found_behind_ray(run: Callable[[Callable[[], None]], None]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the classes differ, which is the point
        run(mistake)
    assert str(find_user_error(caught.value)) == MISTAKE
    with pytest.raises(Exception, match="disk full") as failed:
        run(handled_mistake)
    assert find_user_error(failed.value) is None


def test_found_behind_a_trainer() -> None:
    from ray.train import ControllerError, WorkerGroupError

    error = UserError("no class 'owl'", allowed="cat, dog")
    workers_failed = WorkerGroupError("rank 1 failed", {0: RuntimeError("stopped"), 1: error})
    assert find_user_error(workers_failed) is error
    assert find_user_error(ControllerError(workers_failed)) is error
    assert find_user_error(WorkerGroupError("rank 0 failed", {0: RuntimeError("disk full")})) is None


def test_found_as_a_declared_cause_only() -> None:
    with pytest.raises(RuntimeError) as caught:
        handled_mistake()
    assert find_user_error(caught.value) is None
    declared = RuntimeError("cannot encode")
    declared.__cause__ = UserError("no class")
    assert find_user_error(declared) is declared.__cause__


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_user_error(first) is None
