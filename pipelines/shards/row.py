"""Rows of tables: which of their columns is the key."""

from collections.abc import Mapping

from pipelines.shards.config import InputConfig

__all__ = ["key_columns", "row_key"]

KEY_COLUMNS = ("__key__", "key", "id")


def key_columns(config: InputConfig) -> tuple[str, ...]:
    """The columns that may hold the key, best first."""
    return KEY_COLUMNS if config.key_column is None else (config.key_column,)


def row_key(record: Mapping[str, object], config: InputConfig) -> str | None:
    """The row's key as text, or None where it has none."""
    names = key_columns(config)
    return next((str(record[name]) for name in names if record.get(name) not in (None, "")), None)
