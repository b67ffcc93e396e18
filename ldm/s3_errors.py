"""What an error of S3 means: worth another attempt, a mistake of the user's, or neither."""

import asyncio
from collections.abc import Mapping

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from s3fs.core import S3_RETRYABLE_ERRORS

from ldm.errors import UserError

__all__ = ["S3_ERRORS", "explained", "is_transient"]

TRANSIENT_ERRORS = (*S3_RETRYABLE_ERRORS, ConnectionError)
# What a request can end with: botocore's, s3fs's translations of it, and a malformed endpoint.
S3_ERRORS = (*TRANSIENT_ERRORS, BotoCoreError, ClientError, OSError, asyncio.TimeoutError, ValueError)
CREDENTIAL_ERRORS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
TRANSIENT_CODES = (
    "SlowDown",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",  # of two conditional PUTs at once, S3 may tell one to come again
    "BadDigest",  # this and the next two: damaged on the way there
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
)
RERUN = "check the store and the network, then run again: what is committed stays"


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    status, code = _answer(error)
    return isinstance(error, TRANSIENT_ERRORS) or status in TRANSIENT_STATUS or code in TRANSIENT_CODES


def explained(error: Exception, where: str) -> UserError | None:
    """``error`` as something that the user can act on; None for what code must see, as a missing key."""
    status, code = _answer(error)
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if isinstance(error, CREDENTIAL_ERRORS):
        do = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return UserError(f"no credentials for {where}: {said}", do=do)
    if code == "NoSuchBucket":
        return UserError(f"no such bucket: {where}", do="create it, or check its name and AWS_ENDPOINT_URL")
    if isinstance(error, PermissionError) or status in (401, 403):
        do = "check the credentials and the bucket's policy"
        return UserError(f"access denied to {where} ({code or status}: {said})", do=do)
    if is_transient(error) or isinstance(error, asyncio.TimeoutError):
        return UserError(f"{where} cannot be used, and attempts are exhausted: {said}", do=RERUN)
    if isinstance(error, BotoCoreError) or (isinstance(error, ValueError) and "endpoint" in said):
        return UserError(f"cannot use {where}: {said}", do="check the URL and AWS_ENDPOINT_URL")
    return None


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and S3's code, where the store did answer. s3fs chains what it translates."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, Mapping):
        return None, ""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status, str(response.get("Error", {}).get("Code", ""))
