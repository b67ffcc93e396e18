"""Where a URL becomes a file system: the one place that knows how each kind of store is opened."""

import fsspec
from fsspec import AbstractFileSystem

from ldm.errors import UserError

__all__ = ["filesystem"]

S3_SCHEMES = ("s3://", "s3a://")


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system that ``url`` lies on, and the path there without a slash at its end.

    url: a local path, or any fsspec URL. ``s3://`` takes its endpoint, region and credentials from
    AWS's usual environment variables and files, and repeats what fails for a while (`ldm.s3`).
    UserError where there is no such kind of file system here.
    """
    if url.startswith(S3_SCHEMES):
        # s3fs and botocore take half a second to import, and most runs need neither.
        from ldm.s3 import S3Storage, s3_limits

        return S3Storage(limits=s3_limits()), S3Storage._strip_protocol(url).rstrip("/")
    try:
        opened, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use {url}: {error}") from error
    return opened, path.rstrip("/")
