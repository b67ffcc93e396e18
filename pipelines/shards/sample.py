"""One sample: its key, image and other fields, and what the fields say: label, caption, columns."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ldm.errors import BadSampleError
from pipelines.shards.config import InputConfig

__all__ = ["Sample", "with_named_fields"]

# Travels with the other fields. No file extension holds a slash, so no input can forge it.
PROBLEM = "/problem"
CAPTION_FIELDS = ("caption", "text")


@dataclass(frozen=True)
class Sample:
    """One sample: its key, the image file's bytes (None where it has none), its other fields.

    fields: extension → bytes, such as ``{"json": b"...", "txt": b"...", "cls": b"3"}``. The columns
    of a Parquet or .jsonl row are its ``json``.
    """

    key: str
    image: bytes | None = None
    fields: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def unusable(cls, key: str, error: BadSampleError) -> "Sample":
        """A sample that could not be read, in the place where it was: every method raises ``error``."""
        text = f"{error.reason}\n{error.detail}"
        return cls(key, None, {PROBLEM: text.encode(errors="backslashreplace")})

    def image_bytes(self) -> bytes:
        """The image file. BadSampleError ``no_image`` where there is none."""
        self._require_readable()
        if self.image is None:
            extensions = ", ".join(sorted(self.fields))
            raise BadSampleError("no_image", f"only {extensions}" if extensions else "")
        return self.image

    def label(self) -> int | None:
        """The class index from ``.cls`` or from ``label`` in ``.json``, or None.

        BadSampleError ``bad_label`` where there is one that is no whole number ≥ 0.
        """
        self._require_readable()
        if "cls" in self.fields:
            return _label(self.fields["cls"].decode(errors="replace").strip())
        value = self.record().get("label")
        return None if value is None else _label(value)

    def caption(self) -> str | None:
        """The text of ``.txt``, or of ``caption`` or ``text`` in ``.json``, without space around; or None.

        BadSampleError ``bad_caption`` where it is not text in UTF-8.
        """
        self._require_readable()
        if "txt" in self.fields:
            return _caption(self.fields["txt"])
        record = self.record()
        value = next((record[name] for name in CAPTION_FIELDS if record.get(name) is not None), None)
        return None if value is None else _caption(value)

    def chosen(self, names: Iterable[str]) -> dict[str, object]:
        """The values of ``names`` in ``.json``, None where it has none: what passes through to the output.

        BadSampleError ``bad_json`` where it cannot be read, or cannot be written as UTF-8 again.
        """
        self._require_readable()
        wanted = tuple(names)
        record = self.record() if wanted else {}
        chosen = {name: record.get(name) for name in wanted}
        try:
            json.dumps(chosen, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadSampleError("bad_json", "half of a surrogate pair") from error
        return chosen

    def _require_readable(self) -> None:
        if PROBLEM in self.fields:
            reason, _, detail = self.fields[PROBLEM].decode().partition("\n")
            raise BadSampleError(reason, detail)

    def record(self) -> dict[str, object]:
        """The ``.json``; empty where there is none, or one that is no object. BadSampleError ``bad_json``."""
        try:
            record = json.loads(self.fields.get("json", b"{}"))
        except (ValueError, RecursionError) as error:  # a thousand brackets are not worth a job
            raise BadSampleError("bad_json", str(error)) from error
        return record if isinstance(record, dict) else {}


def with_named_fields(sample: Sample, config: InputConfig) -> Sample:
    """Make the ``.json`` fields that ``config`` names the label and the caption, before any others."""
    if "json" not in sample.fields or not (config.label_field or config.caption_field):
        return sample
    try:
        record = sample.record()
    except BadSampleError as error:
        return Sample.unusable(sample.key, error)
    fields = dict(sample.fields)
    if config.label_field and (label := record.get(config.label_field)) is not None:
        fields["cls"] = str(label).encode(errors="replace")
    if config.caption_field and (caption := record.get(config.caption_field)) is not None:
        if not isinstance(caption, str):
            return Sample.unusable(sample.key, BadSampleError("bad_caption", f"{caption!r} is not text"))
        fields["txt"] = caption.encode(errors="surrogatepass")
    return replace(sample, fields=fields)


def _label(value: object) -> int:
    try:
        label = int(value) if isinstance(value, int | str) else -1
    except ValueError:
        label = -1
    if label < 0:
        raise BadSampleError("bad_label", f"{value!r}: a label is a whole number from 0")
    return label


def _caption(value: object) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig").strip()
        if isinstance(value, str):
            return value.encode().decode().strip()
    except UnicodeError as error:
        raise BadSampleError("bad_caption", str(error)) from error
    raise BadSampleError("bad_caption", f"{value!r} is not text")
