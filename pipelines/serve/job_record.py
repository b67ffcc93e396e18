"""What is known of a long job, and why something cannot be done with it."""

import re
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ldm.errors import LdmError

__all__ = ["JOB_ID", "ContentType", "JobFinished", "JobNotFound", "JobRecord", "Status", "TooManyJobs"]

ContentType: TypeAlias = Literal["image/png", "image/jpeg", "image/webp"]
Status: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled"]

JOB_ID: Final = re.compile("[0-9a-f]{32}")


class JobNotFound(LdmError, LookupError):
    """There is no such job, or not for this principal; one cannot tell which."""


class JobFinished(LdmError):
    """It has ended, here or elsewhere: nothing about it can be changed any more."""


class TooManyJobs(LdmError):
    """``whose`` unfinished jobs are as many as are allowed."""

    def __init__(self, whose: Literal["principal", "server"], allowed: int) -> None:
        super().__init__(whose, allowed)
        self.whose, self.allowed = whose, allowed


class JobRecord(BaseModel):
    """A job. Times are in seconds since 1970; fields of a newer server are ignored.

    ttl_s: that it is kept after its end, at which ``expires_at`` is set. principal: name of the API key, or
    None where the record was damaged and nobody knows. size: WxH of the result. has_preview: set by whoever
    puts one.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    id: Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]
    created_at: float
    updated_at: float
    expires_at: float | None = None
    ttl_s: Annotated[float, Field(ge=0)]
    principal: str | None
    request: dict[str, JsonValue]
    seed: int
    status: Status = "queued"
    stage: str | None = None
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    attempts: int = 0
    has_preview: bool = False
    error: str | None = None
    size: str | None = None
    content_type: ContentType | None = None

    @property
    def is_finished(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def revised(self, **changes: object) -> "JobRecord":
        """With these fields, checked, as those of `model_copy` are not. ValidationError."""
        return JobRecord.model_validate(self.model_dump() | changes)

    def json_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()
