"""What a person reads when a job ends with an exception."""

import sys
import traceback
from collections.abc import Iterator

from ldm.errors import LdmError, UserError

__all__ = ["find_user_error", "report", "summary"]

# What Python prints between an exception and the one raised `from` it.
_DIRECT_CAUSE = "The above exception was the direct cause of the following exception:"
_USER_ERROR_LINE = f"{UserError.__module__}.{UserError.__qualname__}: "


def report(prog: str, failure: Exception) -> bool:
    """Print ``failure`` on stderr; return whether it is the user's to put right.

    A user error, and any other that this project raises in the job's own process, is one line.
    Everything else is a traceback that ends in a one-line summary.
    """
    user_error = find_user_error(failure)
    if user_error is not None:
        print(f"{prog}: error: {user_error}", file=sys.stderr)
        return True
    if isinstance(failure, LdmError) and not _is_from_ray(failure):
        print(f"{prog}: failed: {failure}", file=sys.stderr)
        return False
    traceback.print_exception(failure)
    print(f"{prog}: failed: {summary(failure)}", file=sys.stderr)
    return False


def summary(failure: BaseException) -> str:
    """One line: the failure itself, or for one of Ray's the remote exception at its root."""
    lines = str(failure).split(_DIRECT_CAUSE)[0].strip().splitlines() or [""]
    return lines[-1] if _is_from_ray(failure) else f"{type(failure).__name__}: {lines[0]}"


def _is_from_ray(failure: BaseException) -> bool:
    return type(failure).__module__.startswith("ray.")


def find_user_error(failure: BaseException) -> UserError | None:
    """The first ``UserError`` in ``failure`` or in what caused it, or None.

    A ``UserError`` raised in a Ray task, actor or trainer arrives inside Ray's own exceptions,
    some of which carry it as an object and some only as the text of a traceback.
    """
    links = list(_causes(failure))
    for link in links:
        # Ray also raises a class made of its RayTaskError and ours, whose text is a remote
        # traceback; the plain error is its `cause`, which comes later in the walk.
        if isinstance(link, UserError) and not hasattr(link, "cause"):
            return link
    quoted = (_quoted_user_error(link) for link in links if _is_from_ray(link))
    return next((error for error in quoted if error is not None), None)


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """``failure`` and everything that led to it, nearest first, each once."""
    queue, seen = [failure], set[int]()
    while queue:
        link = queue.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        queue += _direct_causes(link)


def _direct_causes(failure: BaseException) -> list[BaseException]:
    # Told apart by attribute, not by class, so that a job without Ray need not import Ray:
    # RayTaskError.cause, ControllerError.controller_failure, WorkerGroupError.worker_failures.
    named = [failure.__cause__, *(getattr(failure, name, None) for name in ("cause", "controller_failure"))]
    workers = getattr(failure, "worker_failures", None)
    grouped = [*workers.values()] if isinstance(workers, dict) else []
    return [link for link in (*named, *grouped) if isinstance(link, BaseException)]


def _quoted_user_error(failure: BaseException) -> UserError | None:
    """The ``UserError`` in a remote traceback's text: of a Ray Data function or an actor's constructor.

    Only one that ends the traceback, or was the declared cause of what ends it, counts: an error
    that was handled before another one happened is not why the job failed.
    """
    for part in str(failure).split(_DIRECT_CAUSE):
        last_line = (part.strip().splitlines() or [""])[-1]
        if last_line.startswith(_USER_ERROR_LINE):
            return UserError(last_line.removeprefix(_USER_ERROR_LINE))
    return None
