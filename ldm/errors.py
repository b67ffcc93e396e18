"""The exceptions that this project raises on purpose.

LdmError
├── UserError        an input, option or file that the user can put right: exit status 2
└── BadSampleError   one sample that cannot be used: goes to quarantine, the job goes on
"""

__all__ = ["BadSampleError", "LdmError", "UserError"]


class LdmError(Exception):
    """Base class of every exception that this project raises on purpose."""


class UserError(LdmError):
    """A mistake that the user can put right, told in one line.

    ``what`` is wrong (with the value), what is ``allowed``, what to ``do``; the last two may be
    left out where ``what`` already says them. Never put a secret into any of the three.
    """

    def __init__(self, what: str, *, allowed: str = "", do: str = "") -> None:
        self.what, self.allowed, self.do = what, allowed, do
        parts = [what, f"allowed: {allowed}" if allowed else "", do]
        super().__init__(" ".join("; ".join(part for part in parts if part).splitlines()))

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        # Ray pickles an exception on its way from a worker to the driver.
        return _rebuild_user_error, (self.what, self.allowed, self.do)


class BadSampleError(LdmError):
    """One sample that cannot be used, with a stable ``reason`` code such as ``truncated_image``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return BadSampleError, (self.reason, self.detail)


def _rebuild_user_error(what: str, allowed: str, do: str) -> UserError:
    return UserError(what, allowed=allowed, do=do)
