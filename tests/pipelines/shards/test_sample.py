"""Label, caption and chosen fields, and everything that may be wrong with them."""

import json

import pytest

from ldm.errors import BadSampleError
from pipelines.shards import InputConfig, Sample
from pipelines.shards.sample import with_named_fields


def of_json(**record: object) -> Sample:
    return Sample("k", b"i", {"json": json.dumps(record).encode()})


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({}, None),
        ({"txt": "\ufeff a cät \n".encode()}, "a cät"),
        ({"txt": b""}, ""),
        ({"txt": b"t", "json": b'{"caption": "j"}'}, "t"),
        ({"json": b'{"text": "second"}'}, "second"),
        ({"json": b'{"caption": null, "text": "second"}'}, "second"),
        ({"json": b'{"caption": "first", "text": "second"}'}, "first"),
        ({"json": b'["no object"]'}, None),
    ],
)
def test_caption(fields: dict[str, bytes], caption: str | None) -> None:
    assert Sample("k", b"i", fields).caption() == caption


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"txt": b"\xff"}, "bad_caption"),
        ({"json": b'{"caption": 3}'}, "bad_caption"),
        ({"json": rb'{"text": "\ud800"}'}, "bad_caption"),
        ({"json": b"{"}, "bad_json"),
        ({"json": b"\xff"}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
    ],
)
def test_bad_caption(fields: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        Sample("k", b"i", fields).caption()
    assert caught.value.reason == reason


@pytest.mark.parametrize("value", [-1, "x", 1.5, [1], "9" * 5000])
def test_bad_label(value: object) -> None:
    with pytest.raises(BadSampleError, match="bad_label"):
        of_json(label=value).label()


def test_chosen() -> None:
    sample = of_json(a=1, b=[{"c": "ü"}], d=None)
    assert sample.chosen(["b", "a", "missing"]) == {"b": [{"c": "ü"}], "a": 1, "missing": None}
    assert Sample("k", b"i", {"json": b"{"}).chosen([]) == {}
    with pytest.raises(BadSampleError, match="bad_json"):
        Sample("k", b"i", {"json": rb'{"a": "\udfff"}'}).chosen(["a"])


def test_named_fields_come_before_all_others() -> None:
    config = InputConfig(label_field="category", caption_field="prompt")
    sample = of_json(category=4, prompt="from json", label=1, caption="c")
    sample = with_named_fields(Sample("k", b"i", {**sample.fields, "cls": b"2", "txt": b"t"}), config)
    assert (sample.label(), sample.caption()) == (4, "from json")
    assert sample.chosen(["label", "caption"]) == {"label": 1, "caption": "c"}
    unnamed = with_named_fields(of_json(label=1, caption="c"), config)
    assert (unnamed.label(), unnamed.caption()) == (1, "c")
    with pytest.raises(BadSampleError, match="bad_caption"):
        with_named_fields(of_json(prompt=3), config).image_bytes()


def test_an_unusable_sample_says_why_to_everyone() -> None:
    sample = Sample.unusable("k", BadSampleError("missing_file", "a\nb"))
    for ask in (sample.label, sample.caption, sample.image_bytes, lambda: sample.chosen(["a"])):
        with pytest.raises(BadSampleError) as caught:
            ask()
        assert (caught.value.reason, caught.value.detail) == ("missing_file", "a\nb")


def test_no_image_names_what_there_is() -> None:
    with pytest.raises(BadSampleError, match="no_image: only json, txt"):
        Sample("k", None, {"txt": b"", "json": b"{}"}).image_bytes()
