"""``classes.json`` beside the shards: the list of class names; a label is an index into it."""

import json

import fsspec
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError

__all__ = ["CLASSES_FILE", "class_names_bytes", "read_class_names"]

CLASSES_FILE = "classes.json"


def class_names_bytes(names: list[str]) -> bytes:
    """The file's content."""
    return f"{json.dumps(names, ensure_ascii=False, indent=1)}\n".encode()


def read_class_names(source: str) -> tuple[str, ...] | None:
    """The class names of a folder of shards, or None where it has none.

    UserError where the file is not a list of different names.
    """
    filesystem, root = fsspec.url_to_fs(source)
    path = f"{root.rstrip('/')}/{CLASSES_FILE}"
    if filesystem.isfile(root) or not filesystem.exists(path):
        return None
    try:
        names = TypeAdapter(tuple[str, ...]).validate_json(filesystem.cat_file(path))
    except ValidationError as error:
        raise UserError(f"{path} is not a list of class names", allowed='such as ["cat", "dog"]') from error
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a class twice")
    return names
