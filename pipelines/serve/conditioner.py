"""The conditioner stage: texts → embeddings, in replicas that hold the text encoders."""

import asyncio
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.errors import BadSampleError, UserError
from ldm.model_card import ModelCard
from ldm.text import TextEncoder, Tokens, load_text_encoder
from pipelines.device import pick_device
from pipelines.serve.config import StagePool
from pipelines.serve.device_thread import device_thread
from pipelines.serve.messages import Condition
from pipelines.serve.stage_metrics import StageMetrics
from pipelines.serve.tracing import current_span, describe
from pipelines.serve.work_left import WorkMeter

__all__ = ["Conditioner"]

FIRST_GUESS_S = 0.1


class Conditioner:
    """Replica. cards: by model; encoders are loaded when they are first needed."""

    def __init__(self, cards: Mapping[str, ModelCard], pool: StagePool) -> None:
        if pool.threads:
            torch.set_num_threads(pool.threads)
        self.cards, self.device = cards, pick_device()
        self.thread = device_thread("text")
        self.meter, self.metrics = WorkMeter(FIRST_GUESS_S), StageMetrics("conditioner")
        self._encoders: dict[str, TextEncoder] = {}

    async def encode(self, model: str, texts: Sequence[str]) -> list[Condition] | str:
        """A condition for each text; or what is wrong with one of them."""
        work, span, asked = self.meter.begin(len(texts)), current_span(), time.perf_counter()
        loop = asyncio.get_running_loop()

        def call() -> list[Condition]:
            describe(span, texts=len(texts), queue_s=time.perf_counter() - asked)
            return self._encode(model, texts)

        try:
            return await loop.run_in_executor(self.thread, call)
        except (BadSampleError, UserError) as error:
            return str(error)
        finally:
            self.meter.end(work)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `pipelines.serve.work_left.WorkLeft`."""
        return self.meter.stats()

    def _encode(self, model: str, texts: Sequence[str]) -> list[Condition]:
        started = time.perf_counter()
        card = self.cards[model]
        found = [Condition(embedding_LD=row) for row in embed(self._encoder(card), texts, card)]
        seconds = time.perf_counter() - started
        self.meter.measured(len(texts), seconds)
        self.metrics.done(seconds)
        return found

    def _encoder(self, card: ModelCard) -> TextEncoder:
        assert card.text_encoder is not None
        if card.text_encoder not in self._encoders:
            self._encoders[card.text_encoder] = load_text_encoder(card.text_encoder).to(self.device)
        return self._encoders[card.text_encoder]


def embed(encoder: TextEncoder, texts: Sequence[str], card: ModelCard) -> list[NDArray[np.float32]]:
    """Embeddings (L, D) of texts; an empty one's is what the model was trained with as "no text"."""
    if card.padded_text:
        tokens = [_padded(encoder.tokenise(text), encoder) for text in texts]
        return [hidden_LD.numpy() for hidden_LD in encoder.embed(tokens)]
    none_1D = torch.zeros(1, encoder.width)
    found = encoder.embed([encoder.tokenise(text or " ") for text in texts])
    return [(hidden_LD if text else none_1D).numpy() for text, hidden_LD in zip(texts, found, strict=True)]


def _padded(tokens: Tokens, encoder: TextEncoder) -> Tokens:
    padding = (encoder.tokenizer.pad_token_id,) * (encoder.max_tokens - len(tokens.ids))
    return Tokens((*tokens.ids, *padding), tokens.is_truncated)
