from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import BadSampleError, UserError
from ldm.text import TextEncoder, load_text_encoder
from pipelines.encode.actors import UnitTextEncoder
from pipelines.encode.pools import TextPool
from pipelines.encode.rows import ReadUnit
from pipelines.encode.text import EmbeddedCaptions, embed_captions, embed_unit
from pipelines.encode.units import Unit, UnitSamples
from pipelines.shards import Sample, Shard
from pipelines.text_config import TextConfig
from tests.tiny_text import CLIP_MAX_TOKENS, WIDTH, save_clip

LONG = "the cat " * 500
CAPTIONS = ["the dog", None, "", "the cat", "the dog", "🐱 日本", LONG, None, "", "The dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(str(folder))


def arrays(embedded: EmbeddedCaptions) -> list[np.ndarray]:
    assert not any(isinstance(found, BadSampleError) for found in embedded.embeddings_T)
    return [found for found in embedded.embeddings_T if not isinstance(found, BadSampleError)]


def test_each_distinct_caption_is_embedded_once_in_the_order_of_first_use(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    embed = encoder.embed

    def counted(tokens: list[object], micro_batch: int) -> list[torch.Tensor]:
        seen.append(len(tokens))
        return embed(tokens, micro_batch)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "embed", counted)
    embedded = embed_captions(encoder, CAPTIONS)
    assert embedded.texts == ["the dog", "", "the cat", "🐱 日本", LONG, "The dog"]
    assert seen == [6]
    for text, embedding in zip(embedded.texts, arrays(embedded), strict=True):
        np.testing.assert_allclose(embedding, encoder.encode([text])[0], rtol=1e-3, atol=1e-3)
    assert embedded.num_truncated == 1
    assert len(arrays(embedded)[4]) == CLIP_MAX_TOKENS


def test_a_unit_gives_the_same_bits_every_time(encoder: TextEncoder) -> None:
    first, again = (arrays(embed_captions(encoder, CAPTIONS, 4)) for _ in range(2))
    assert [e.tobytes() for e in first] == [e.tobytes() for e in again]


@pytest.mark.parametrize("captions", [[], [None, None]])
def test_a_unit_without_captions_has_no_embedding(encoder: TextEncoder, captions: list[str | None]) -> None:
    assert embed_captions(encoder, captions) == ([], [], 0)


def test_a_caption_that_cannot_be_embedded_does_not_touch_the_others(folder: Path) -> None:
    encoder = load_text_encoder(str(folder))
    (poison,) = set(encoder.tokenise("x").ids) - set(encoder.tokenise("").ids)
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[poison] = torch.nan
    embedded = embed_captions(encoder, ["the cat", "\ud83d", "x", "the dog"])
    assert embedded.texts == ["the cat", "\ud83d", "x", "the dog"]
    reasons = [f.reason if isinstance(f, BadSampleError) else f.shape for f in embedded.embeddings_T]
    assert reasons[1:3] == ["bad_caption", "non_finite_embedding"]
    alone = load_text_encoder(str(folder)).encode(["the cat", "the dog"])
    assert np.array_equal(embedded.embeddings_T[0], alone[0])
    assert np.array_equal(embedded.embeddings_T[3], alone[1])
    samples = [Sample(text, b"", {"txt": text.encode()}) for text in ("x", "the cat")]
    of_unit = embed_unit(encoder, samples, 4)
    assert list(of_unit.texts) == ["the cat"]
    assert {text: error.reason for text, error in of_unit.failures.items()} == {"x": "non_finite_embedding"}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of an actor without a GPU; asked outside of one, Ray would start a cluster."""
    monkeypatch.setattr("pipelines.device.pick_device", lambda: torch.device("cpu"))


@pytest.mark.usefixtures("cpu")
def test_the_actor_adds_the_embeddings_to_the_row(folder: Path) -> None:
    config = TextConfig(encoder=str(folder), layer=-2, max_tokens=10)
    expected = load_text_encoder(str(folder), layer=-2, max_tokens=10)
    actor = UnitTextEncoder(config, expected.fingerprint, TextPool(micro_batch=4), None)
    captions = ["the cat", None, "a dogs", "the cat", LONG]
    samples = [Sample(str(i), b"", {} if c is None else {"txt": c.encode()}) for i, c in enumerate(captions)]
    samples.append(Sample("broken", b"", {"txt": b"\xff"}))
    unit = Unit("s-00000000-000000", Shard("file:///s.tar", "s", "1"), 0, 0, 5, is_final=True)
    table = ReadUnit(UnitSamples(unit, samples)).to_table()
    once, twice = actor(table), actor(actor(table))
    assert once.num_rows == 1 and twice == once
    read = ReadUnit.from_table(once)
    assert read.content == UnitSamples(unit, samples)
    assert list(read.embedded.texts) == ["the cat", "a dogs", LONG.strip()]
    assert [e.shape for e in read.embedded.embeddings_T] == [(6, WIDTH), (7, WIDTH), (10, WIDTH)]
    assert not read.embedded.failures
    for embedding, alone in zip(
        read.embedded.embeddings_T, expected.encode(["the cat", "a dogs", LONG]), strict=True
    ):
        np.testing.assert_allclose(embedding, alone, rtol=1e-3, atol=1e-3)


def test_an_actor_with_another_encoder_than_the_driver_stops(
    folder: Path, tmp_path: Path, encoder: TextEncoder
) -> None:
    save_clip(tmp_path, seed=1)
    for config in (TextConfig(encoder=str(tmp_path)), TextConfig(encoder=str(folder), layer=-2)):
        with pytest.raises(UserError, match="is another than on the driver"):
            UnitTextEncoder(config, encoder.fingerprint, TextPool(), None)
