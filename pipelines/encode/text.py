"""The distinct captions of a unit → embeddings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldm.errors import BadSampleError
from ldm.text import Embedding, TextEncoder, Tokens, stored_embedding
from pipelines.encode.rows import Embedded
from pipelines.shards import Sample

__all__ = ["EmbeddedCaptions", "embed_captions", "embed_unit"]


class EmbeddedCaptions(NamedTuple):
    """The distinct captions of a unit in the order of their first use, and of each what came of it.

    embeddings_T: float16 (L, D), or why there is none; num_truncated: distinct captions that were cut.
    """

    texts: list[str]
    embeddings_T: list[Embedding | BadSampleError]
    num_truncated: int


def embed_unit(encoder: TextEncoder, samples: Sequence[Sample], micro_batch: int) -> Embedded:
    """The embeddings of the captions of some samples; one that cannot be had is among the failures."""
    found = embed_captions(encoder, [_caption(sample) for sample in samples], micro_batch)
    pairs = list(zip(found.texts, found.embeddings_T, strict=True))
    good = {text: value for text, value in pairs if not isinstance(value, BadSampleError)}
    failures = {text: value for text, value in pairs if isinstance(value, BadSampleError)}
    return Embedded(list(good), list(good.values()), failures)


def _caption(sample: Sample) -> str | None:
    try:
        return sample.caption()
    except BadSampleError:
        return None  # the decode stage says so of the whole sample


def embed_captions(
    encoder: TextEncoder, captions: Sequence[str | None], micro_batch: int = 32
) -> EmbeddedCaptions:
    """Embed each distinct caption once; None is no caption, ``""`` is one.

    One that cannot be embedded (`TextEncoder.tokenise`, `stored_embedding`) does not touch the others.
    """
    texts = list(dict.fromkeys(caption for caption in captions if caption is not None))
    tokens = {text: _tokens(encoder, text) for text in texts}
    good = {text: found for text, found in tokens.items() if isinstance(found, Tokens)}
    hidden = dict(zip(good, encoder.embed(list(good.values()), micro_batch), strict=True))
    failed = {text: found for text, found in tokens.items() if isinstance(found, BadSampleError)}
    stored = {text: _stored(hidden_LD) for text, hidden_LD in hidden.items()}
    embeddings = [failed[text] if text in failed else stored[text] for text in texts]
    return EmbeddedCaptions(texts, embeddings, sum(found.is_truncated for found in good.values()))


def _tokens(encoder: TextEncoder, text: str) -> Tokens | BadSampleError:
    try:
        return encoder.tokenise(text)
    except BadSampleError as error:
        return error


def _stored(hidden_LD: torch.Tensor) -> Embedding | BadSampleError:
    try:
        return stored_embedding(hidden_LD)
    except BadSampleError as error:
        return error
