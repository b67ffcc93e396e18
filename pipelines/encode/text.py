"""The text stage: the distinct captions of a unit → embeddings, on one text encoder per actor."""

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa
import torch

from ldm.errors import BadSampleError, UserError
from ldm.text import Embedding, TextEncoder, Tokens, load_text_encoder, stored_embedding
from pipelines.device import pick_device
from pipelines.encode.attempts import Register, attempt
from pipelines.encode.pools import TextPool
from pipelines.encode.rows import Embedded, ReadUnit
from pipelines.shards import Sample
from pipelines.text_config import TextConfig

__all__ = ["EmbeddedCaptions", "UnitTextEncoder", "embed_captions", "embed_unit"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EmbeddedCaptions(NamedTuple):
    """The distinct captions of a unit in the order of their first use, and of each what came of it.

    embeddings_T: float16 (L, D), or why there is none; num_truncated: distinct captions that were cut.
    """

    texts: list[str]
    embeddings_T: list[Embedding | BadSampleError]
    num_truncated: int


class UnitTextEncoder:
    """The callable of the actor pool: loads the text encoder once, then embeds one unit per call."""

    def __init__(self, config: TextConfig, fingerprint: str, pool: TextPool, register: Register) -> None:
        # Fixed, because the number of threads can change the last bits of a matrix product.
        torch.set_num_threads(max(1, math.floor(pool.num_cpus)))
        assert config.encoder is not None
        encoder = load_text_encoder(config.encoder, layer=config.layer, max_tokens=config.max_tokens)
        # What lies under a path on this node need not be what the driver read there.
        if encoder.fingerprint != fingerprint:
            raise UserError(
                f"text encoder {config.encoder} on node {platform.node()} is another than on the driver",
                do="give every node the same files",
            )
        self.encoder = encoder.to(pick_device(), DTYPES[pool.precision])
        self.micro_batch, self.register = pool.micro_batch, register

    def __call__(self, table: pa.Table) -> pa.Table:
        """`ReadUnit` row → the same with the embeddings of its captions."""
        unit = ReadUnit.from_table(table)
        with attempt(self.register, "text", unit.content.unit.id):
            embedded = embed_unit(self.encoder, unit.content.samples, self.micro_batch)
        return replace(unit, embedded=embedded).to_table()


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
