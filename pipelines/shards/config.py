"""How an input is to be read: which columns mean what, and how large a sample may be."""

from pydantic import BaseModel, Field, PositiveInt

__all__ = ["InputConfig"]


class InputConfig(BaseModel, frozen=True, extra="forbid"):
    """Names of columns and fields, and limits. Sources that follow the usual names need none of it."""

    image_column: str = Field("image", description="Parquet column, or field of a .jsonl row, of the image")
    key_column: str | None = Field(
        None, description="column or field of the key; without it __key__, key or id, else file and row"
    )
    caption_field: str | None = Field(
        None, description="column or .json field of the caption; without it .txt, caption or text"
    )
    label_field: str | None = Field(
        None, description="column or .json field of the class index; without it .cls, sub-folder or label"
    )
    fields: tuple[str, ...] | None = Field(
        None, description="Parquet columns to read besides; without it all that are plain values"
    )
    digest: bool = Field(False, description="version by SHA-256 of the content, not by etag or size and time")
    # A JPEG of as many pixels as preprocessing lets pass is smaller.
    max_member_bytes: PositiveInt = Field(64 << 20, description="bytes of one file, and of one sample")
