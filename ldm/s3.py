"""S3 as a file system on which an operation is exact, or fails in one line within a known time.

s3fs and botocore each have loops of retries, and s3fs has one inside another: together they multiply
to minutes, and yet leave out a plain 500. Here all of them are off, and one loop stands around the
request *and* the reading of its answer, so that a body which breaks off is asked for again.
"""

import asyncio
import io
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from s3fs import S3FileSystem
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from ldm.errors import UserError
from ldm.s3_errors import S3_ERRORS, explained, is_transient

__all__ = ["S3Limits", "S3Storage", "s3_limits"]

BLOCK_BYTES = 16 * 2**20
# s3fs sends less than twice this in one PUT, whose limit is 5 GiB. A PUT is atomic, may be repeated,
# and leaves no parts behind that cost money and are in no listing, as an upload in parts does.
PUT_CHUNK_BYTES = 5 * 2**29


class S3Limits(BaseSettings):
    """How long one operation on S3 may try; each field is also ``LDM_S3_<FIELD>`` in the environment.

    With the defaults a store that answers with errors only is given up after about 15 s, one that
    does not answer after 220 s; nothing, however slow the store sends, takes longer than deadline_s.
    """

    model_config = SettingsConfigDict(env_prefix="LDM_S3_", frozen=True)

    attempts: int = Field(10, ge=1)
    first_wait_s: float = Field(0.2, ge=0)  # waits are drawn from 0 to this, doubled every time
    longest_wait_s: float = Field(5.0, ge=0)
    connect_timeout_s: float = Field(5.0, gt=0)
    read_timeout_s: float = Field(20.0, gt=0)  # without a byte
    deadline_s: float = Field(300.0, gt=0)


def s3_limits() -> S3Limits:
    """The limits that the environment sets. UserError where it sets one wrongly."""
    try:
        return S3Limits()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"LDM_S3_{str(first['loc'][0]).upper()}: {first['msg']}") from error


class S3Storage(S3FileSystem):  # type: ignore[misc]
    """s3fs with one loop of retries, errors in plain words, and listings that are never old."""

    def __init__(self, *, limits: S3Limits, **options: object) -> None:
        config = {
            "connect_timeout": limits.connect_timeout_s,
            "read_timeout": limits.read_timeout_s,
            "retries": {"total_max_attempts": 1},
        }
        # One request per read: the concurrent reads of s3fs ask for the size first.
        fixed = {"max_concurrency": 1, "use_listings_cache": False, "default_block_size": BLOCK_BYTES}
        super().__init__(config_kwargs=config, **fixed, **options)
        self.limits = limits
        self.retries = 1  # attempts of s3fs's own loops

    async def _call_s3(self, method: str, *parameters: object, **named: object) -> object:
        """Every request of s3fs comes through here; ``get_object`` answers with a body in memory."""
        call = super()._call_s3

        async def attempt() -> object:
            reply = await call(method, *parameters, **named)
            if method == "get_object":
                reply["Body"] = await _read_whole(reply["Body"])
            return reply

        try:
            return await asyncio.wait_for(self._retrying()(attempt), self.limits.deadline_s)
        except S3_ERRORS as error:
            where = "/".join(str(named[part]) for part in ("Bucket", "Key") if part in named)
            plain = explained(error, f"s3://{where}")
            if plain is None:
                raise
            raise plain from error

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(self.limits.attempts),
            wait=wait_random_exponential(self.limits.first_wait_s, self.limits.longest_wait_s),
            reraise=True,
        )

    async def _pipe_file(self, path: str, data: bytes, **options: object) -> None:
        """One PUT, if below 5 GiB: the file is there whole, or not at all."""
        await super()._pipe_file(path, data, **{"chunksize": PUT_CHUNK_BYTES, **options})

    async def _get_file(self, rpath: str, lpath: str, **options: object) -> None:
        """Copy to a local file block by block. OSError where the object changes meanwhile."""
        if Path(lpath).is_dir():
            return
        info = await self._info(rpath)
        with Path(lpath).open("wb") as stream:
            for start in range(0, info["size"], BLOCK_BYTES):
                end = min(start + BLOCK_BYTES, info["size"])
                stream.write(await self._cat_file(rpath, start=start, end=end))
        if (await self._info(rpath))["ETag"] != info["ETag"]:
            raise OSError(f"s3://{rpath} changed while it was read")


class _WholeBody(io.BytesIO):
    """A body that has arrived, with the methods of one that is still streamed."""

    async def read(self, length: int | None = -1) -> bytes:  # type: ignore[override]
        return super().read(length)


async def _read_whole(body: "_WholeBody") -> _WholeBody:
    """Raises one of S3_ERRORS where the body is shorter than its declared length."""
    try:
        return _WholeBody(await body.read())
    finally:
        body.close()
