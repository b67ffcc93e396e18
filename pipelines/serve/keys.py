"""API keys: who may ask this server for anything, by the SHA-256 of the key.

A key is 32 random bytes, so a plain hash of it is enough: there is nothing to guess, and salt and slow hashes
protect what can be guessed. Whoever reads the key file cannot use what it holds.

The key file has one JSON object a line; empty lines, and those that start with ``#``, are skipped:

    {"name": "alice", "sha256": "5d0…", "requests_per_minute": 60, "max_concurrent": 4}

The last two are optional, and replace the server's defaults. `new_key` makes a line.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from ldm.errors import UserError

__all__ = ["ANONYMOUS", "ENVIRONMENT", "KeyEntry", "KeyRing", "new_key"]

ANONYMOUS = "anonymous"
ENVIRONMENT = "LDM_API_KEYS"
MIN_KEY_CHARS = 32
# What can stand after "Bearer" (RFC 6750, section 2.1).
BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")
# Of others anything, of the group to write; a secret mounted into a container is the group's to read.
FORBIDDEN_MODE = 0o027


class KeyEntry(BaseModel):
    """One key. name: of its owner, in logs and in what the owner sees; None: the server's defaults hold."""

    # A clear key put where its hash belongs must not come back in an error.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: PositiveInt | None = None
    max_concurrent: PositiveInt | None = None


class KeyRing:
    """The keys of a server. Without any it is open, and everybody is `ANONYMOUS`."""

    def __init__(self, entries: Iterable[KeyEntry] = ()) -> None:
        """`UserError` for two of one name, two of one key, and for the name of those without a key."""
        self.entries = tuple(entries)
        _refuse_doubles(self.entries)

    @classmethod
    def load(cls, key_file: Path | None, environment: Mapping[str, str] = os.environ) -> "KeyRing":
        """Of the file and of ``LDM_API_KEYS``, which is ``name:KEY,name:KEY`` in clear; hashed here.

        `UserError` for what is wrong in either; also if one is there and holds no key, as that would open a
        server that was to be closed.
        """
        entries = [] if key_file is None else _of_file(key_file)
        if ENVIRONMENT in environment:
            entries += _of_environment(environment[ENVIRONMENT])
        return cls(entries)

    @property
    def is_open(self) -> bool:
        return not self.entries

    def find(self, key: bytes) -> KeyEntry | None:
        """Whose key it is; takes as long for one that is known as for one that is not."""
        presented = hashlib.sha256(key).hexdigest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.sha256, presented):
                found = entry
        return found


def new_key(name: str) -> tuple[str, str]:
    """A new key in clear, to be shown once, and the line for the key file, without a line end."""
    key = "ldm-" + secrets.token_urlsafe(32)
    return key, _entry(name, key, f"name {name!r}").model_dump_json(exclude_none=True)


def _of_file(path: Path) -> list[KeyEntry]:
    entries = []
    for number, line in enumerate(_private_text(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            try:
                entries.append(KeyEntry.model_validate_json(line))
            except ValidationError as error:
                _refuse_entry(f"line {number} of {path}", error)
    if not entries:
        raise UserError(
            f"key file {path} holds no key", do="add one, or leave out key_file for an open server"
        )
    return entries


def _private_text(path: Path) -> str:
    """Checked on what is opened, not on what had that name before."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read().decode()
    except OSError as error:
        raise UserError(f"cannot read key file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"key file {path} is not text", allowed="one JSON object a line, in UTF-8") from error
    if mode & FORBIDDEN_MODE:
        raise UserError(
            f"key file {path} can be read or changed by others (mode {mode:04o})", do=f"run: chmod 600 {path}"
        )
    return text


def _of_environment(value: str) -> list[KeyEntry]:
    entries = []
    for number, pair in enumerate(filter(str.strip, value.split(",")), start=1):
        name, colon, key = pair.strip().partition(":")
        place = f"entry {number} of {ENVIRONMENT}"
        if not colon or len(key) < MIN_KEY_CHARS or not BEARER.fullmatch(key):
            raise UserError(
                f"{place} cannot be used",
                allowed=f"name:KEY with a KEY of at least {MIN_KEY_CHARS} letters, digits and ._~+/-=",
                do="make a key with: openssl rand -hex 32",
            )
        entries.append(_entry(name, key, place))
    if not entries:
        raise UserError(f"{ENVIRONMENT} is set and holds no key", do="unset it for an open server")
    return entries


def _entry(name: str, key: str, place: str) -> KeyEntry:
    try:
        return KeyEntry(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())
    except ValidationError as error:
        _refuse_entry(place, error)


def _refuse_entry(place: str, error: ValidationError) -> NoReturn:
    """Of pydantic's first error where and why, never the value. Nor as cause: it holds what was given."""
    first = error.errors(include_input=False, include_url=False)[0]
    # A field that is not one of ours may be a key, put in the wrong place.
    named = first["loc"] and first["loc"][0] in KeyEntry.model_fields
    raise UserError(f"{place}: {first['loc'][0] if named else 'entry'}: {first['msg']}") from None


def _refuse_doubles(entries: Iterable[KeyEntry]) -> None:
    names, hashes = {ANONYMOUS}, dict[str, str]()
    for entry in entries:
        if entry.name in names:
            raise UserError(
                f"two keys have the name {entry.name!r}, or it is kept for those without one",
                do="give each key a name of its own",
            )
        if entry.sha256 in hashes:
            raise UserError(
                f"{hashes[entry.sha256]!r} and {entry.name!r} have the same key",
                do="make one of them a new key",
            )
        names.add(entry.name)
        hashes[entry.sha256] = entry.name
