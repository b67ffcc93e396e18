"""Class names of an input: ``classes.json`` in its folder, or the sub-folders of a folder of images.

A label is an index into them.
"""

import json
from collections.abc import Iterable

from fsspec import AbstractFileSystem
from pydantic import TypeAdapter, ValidationError

from ldm import storage
from ldm.errors import UserError
from pipelines.input_files import InputFile, is_image, visible_files

__all__ = ["CLASSES_FILE", "class_names_bytes", "class_names_of_images", "read_class_names"]

CLASSES_FILE = "classes.json"


def class_names_bytes(names: list[str]) -> bytes:
    """The file's content."""
    return f"{json.dumps(names, ensure_ascii=False, indent=1)}\n".encode()


def read_class_names(source: str) -> tuple[str, ...] | None:
    """The class names of an input, or None where it has none.

    UserError where ``classes.json`` is not a list of different names, or lacks a sub-folder of images.
    """
    filesystem, root = storage.filesystem(source)
    if filesystem.isfile(root):
        return None
    return class_names_of_images(filesystem, root, visible_files(filesystem, root))


def class_names_of_images(
    filesystem: AbstractFileSystem, root: str, files: Iterable[InputFile]
) -> tuple[str, ...] | None:
    """The class names where the folder's files are listed already."""
    folders = sorted({file.name.split("/")[0] for file in files if "/" in file.name and is_image(file.name)})
    path = f"{root.rstrip('/')}/{CLASSES_FILE}"
    if not filesystem.exists(path):
        return tuple(folders) or None
    names = _parse(path, filesystem.cat_file(path))
    if unknown := [folder for folder in folders if folder not in names]:
        raise UserError(f"{path} does not name the class of the folder {unknown[0]!r}")
    return names


def _parse(path: str, content: bytes) -> tuple[str, ...]:
    try:
        names = TypeAdapter(tuple[str, ...]).validate_json(content)
    except ValidationError as error:
        raise UserError(f"{path} is not a list of class names", allowed='such as ["cat", "dog"]') from error
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a class twice")
    return names
