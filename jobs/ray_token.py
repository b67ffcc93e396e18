"""The token of a Ray cluster with authentication: looked for where Ray looks, in files of one's own only."""

import os
import secrets
import stat
from pathlib import Path

from ldm.errors import UserError

__all__ = ["PATH_VARIABLE", "find_token", "make_token", "read_token"]

# As ray._private.authentication: the first of these that is set, then the file of `ray get-auth-token`.
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"


def find_token() -> str | None:
    """The token of RAY_AUTH_TOKEN, of the file RAY_AUTH_TOKEN_PATH, or of ~/.ray/auth_token; None without.

    UserError where a file is named and cannot be used.
    """
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    if named := os.environ.get(PATH_VARIABLE):
        return read_token(Path(named).expanduser())
    default = Path.home() / ".ray" / "auth_token"
    return read_token(default) if default.exists() else None


def make_token(path: Path) -> str:
    """A new token of 32 random bytes, in a new file that nobody else can read, not for a moment."""
    token = secrets.token_hex(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    return token


def read_token(path: Path) -> str:
    """The token in a file. UserError where others can read it, it cannot be read, or it is empty."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read the token file {path}: {reason}", do=f"set {PATH_VARIABLE}") from error
    if mode & 0o077:
        raise UserError(f"token file {path} is open to others (mode {mode:03o})", do=f"chmod 600 {path}")
    if not token:
        raise UserError(f"token file {path} is empty", do="write the cluster's token into it")
    return token
