"""Turns what pydantic finds wrong with a config into one line for the person who wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jobs.option_sources import KeyPath, OptionPlace, nearest
from ldm.errors import UserError

__all__ = ["explained"]

MAX_VALUE_CHARS = 60


def explained(error: ValidationError, model: type[BaseModel], sources: Sequence[OptionPlace]) -> UserError:
    """One ``UserError`` for all mistakes in ``error``, each spelt as in the place it came from.

    ``sources`` are those that ``model`` was built from, highest priority first; the first is the
    command line, whose spelling also names what was given nowhere.
    """
    # One value against a union gives one error per member of the union: the first says enough.
    mistakes: dict[KeyPath, UserError] = {}
    for detail in error.errors(include_url=False):
        key = _resolve(model, detail)
        mistakes.setdefault(key.path, _mistake(detail, key, _origin(key.path, sources)))
    found = list(mistakes.values())
    return found[0] if len(found) == 1 else UserError(" | ".join(str(mistake) for mistake in found))


@dataclass(frozen=True)
class _Key:
    """A key of the config: its path, its annotation, and the names allowed beside it."""

    path: KeyPath
    annotation: object
    siblings: tuple[str, ...]


def _resolve(model: type[BaseModel], detail: ErrorDetails) -> _Key:
    """The key that ``detail`` is about.

    pydantic's ``loc`` also has parts that nobody typed, such as the member of a union: they go.
    """
    path: KeyPath = ()
    annotation: object = model
    for part in detail["loc"]:
        fields = _fields_in(annotation)
        if part in fields:
            path, annotation = (*path, str(part)), fields[str(part)].annotation
        elif isinstance(part, int):
            path = (*path, str(part))
    if detail["type"] == "extra_forbidden":
        return _Key((*path, str(detail["loc"][-1])), None, tuple(_fields_in(annotation)))
    return _Key(path, annotation, ())


def _fields_in(annotation: object) -> dict[str, FieldInfo]:
    """Fields of the models that ``annotation`` names, be it one, a union or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return dict(annotation.model_fields)
    return {name: field for part in get_args(annotation) for name, field in _fields_in(part).items()}


def _is_secret(annotation: object) -> bool:
    return annotation in (SecretStr, SecretBytes) or any(_is_secret(part) for part in get_args(annotation))


def _origin(path: KeyPath, sources: Sequence[OptionPlace]) -> OptionPlace:
    """The place that set ``path``, or the command line if none did."""
    return next((source for source in sources if _holds(source.values, path)), sources[0])


def _holds(values: object, path: KeyPath) -> bool:
    for part in path:
        if not isinstance(values, Mapping):
            return True  # the path goes on into a list or a value that this place did set
        if part not in values:
            return False
        values = values[part]
    return bool(path)


def _mistake(detail: ErrorDetails, key: _Key, origin: OptionPlace) -> UserError:
    where = origin.spell(key.path) + (f" in {origin.file}" if origin.file else "")
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    match detail["type"]:
        case "extra_forbidden":
            *parents, name = key.path
            hint = nearest(name, key.siblings, lambda sibling: origin.spell((*parents, sibling)))
            return UserError(f"unknown option {where}", do=hint)
        case "missing":
            do = "add it" if origin.file else "give it on the command line or in --config FILE"
            return UserError(f"{where} is missing", do=do)
        case "value_error" | "assertion_error":
            return UserError(f"{where}: {message}" if key.path else message)
    shown = "not allowed" if _is_secret(key.annotation) else _shown(detail["input"])
    return UserError(f"{where} is {shown}", allowed=message.split(", unable to")[0])


def _shown(value: object) -> str:
    """A single value as typed, cut to a length that leaves the line readable; else only its type."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."
