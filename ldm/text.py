"""Text encoders: captions → hidden states, each at its true length, whatever it was batched with.

Texts are batched with texts of equally many tokens only, so no padding is ever computed or stored.
Shape suffixes: B texts, L tokens of a text (those that open and close it included), D features.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm import text_files
from ldm.errors import BadSampleError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Embedding", "TextEncoder", "Tokens", "load_text_encoder", "stored_embedding"]

Embedding: TypeAlias = NDArray[np.float16]

FP16_MAX = float(torch.finfo(torch.float16).max)
# A tokenizer without a limit states 10³⁰.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it: ``ids`` with those that open and close it; whether it was cut."""

    ids: tuple[int, ...]
    is_truncated: bool


class TextEncoder:
    """A transformers text encoder and its tokenizer, in evaluation mode and without gradients.

    Attributes: ``layer`` the hidden state that is taken, None for the model's output (after its final
    normalisation); ``max_tokens`` the most that a text may have; ``width`` is D.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        files_digest: bytes,
        *,
        layer: int | None,
        max_tokens: int,
    ) -> None:
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.layer, self.max_tokens = layer, max_tokens
        self.width = int(model.config.hidden_size)
        self._files_digest = files_digest

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> TextEncoder:
        """Move in place; returns itself. What the model asks to stay in fp32 beside fp16 does."""
        nn.Module.to(self.model, device=device, dtype=dtype)
        if dtype == torch.float16:
            for name, module in self.model.named_modules():
                # T5's feed-forward output: in fp16 it overflows, and every caption becomes NaN.
                if name.rpartition(".")[2] in (self.model._keep_in_fp32_modules or ()):
                    module.float()
        return self

    def encode(self, texts: Sequence[str], micro_batch: int = 32) -> list[Embedding]:
        """Embeddings (L, D) of texts, in order; L is each text's own. ``""`` is a text like any other.

        BadSampleError as `tokenise` and `stored_embedding` raise it, for the first text that is bad.
        """
        tokens = [self.tokenise(text) for text in texts]
        return [stored_embedding(hidden_LD) for hidden_LD in self.embed(tokens, micro_batch)]

    def tokenise(self, text: str) -> Tokens:
        """A text's tokens, cut to ``max_tokens``; those that open and close a text survive the cut.

        BadSampleError ``bad_caption`` for a text that is no valid unicode or has no token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadSampleError("bad_caption", f"{error.reason} at character {error.start}") from error
        ids = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if not ids:
            raise BadSampleError("bad_caption", "no token")
        if len(ids) <= self.max_tokens:
            return Tokens(tuple(ids), is_truncated=False)
        cut = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return Tokens(tuple(cut), is_truncated=True)

    def embed(self, tokens: Sequence[Tokens], micro_batch: int = 32) -> list[Tensor]:
        """Hidden states (L, D), float32 on the CPU, in order; at most ``micro_batch`` texts at a time.

        Texts of one length meet in their order, so which do depends on ``tokens`` alone.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, text in enumerate(tokens):
            by_length[len(text.ids)].append(index)
        found: dict[int, Tensor] = {}
        for indices in by_length.values():
            for start in range(0, len(indices), micro_batch):
                batch = indices[start : start + micro_batch]
                hidden_BLD = self._hidden(torch.tensor([tokens[index].ids for index in batch]))
                found.update(zip(batch, hidden_BLD, strict=True))
        return [found[index] for index in range(len(tokens))]

    @torch.inference_mode()
    def _hidden(self, ids_BL: Tensor) -> Tensor:
        ids_BL = ids_BL.to(self.model.device)
        output = self.model(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            output_hidden_states=self.layer is not None,
        )
        hidden: Tensor = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return hidden.float().cpu()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, weights, tokenizer files, layer and cut: equal for equal functions.

        As with `ldm.autoencoder.Autoencoder.fingerprint`, weights are read as float32 in the dtype
        that they have now.
        """
        options = f"{type(self.model).__name__} {self.layer} {self.max_tokens}"
        digest = hashlib.sha256(self._files_digest + options.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if not text_files.is_unused(name):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().contiguous().cpu().numpy().reshape(-1))
        return digest.hexdigest()


def load_text_encoder(source: str, *, layer: int | None = None, max_tokens: int | None = None) -> TextEncoder:
    """A text encoder in fp32 on the CPU.

    source: a folder or hub id (`ldm.text_files.find`). layer: an index into the model's hidden
    states, of which the first is the embedded tokens and -2 the last but one (Stable Diffusion XL's
    choice); None is the model's output. max_tokens: longer texts are cut; None is the most that model
    and tokenizer take.

    UserError where there is no such encoder, its files are damaged, or an option does not fit it.
    """
    if find_spec("transformers") is None:
        raise UserError("text encoders need the package transformers", do="pip install 'ray-ldm[text]'")
    files = text_files.find(source)
    model, tokenizer = text_files.read_model(files), text_files.read_tokenizer(files)
    return TextEncoder(
        model,
        tokenizer,
        files.digest(),
        layer=_checked_layer(model, layer, source),
        max_tokens=_checked_max_tokens(model, tokenizer, max_tokens, source),
    )


def stored_embedding(hidden_LD: Tensor) -> Embedding:
    """float32 → float16.

    BadSampleError ``non_finite_embedding``, or ``embedding_overflow`` where fp16 cannot hold a value.
    """
    largest = float(hidden_LD.abs().max())
    if not np.isfinite(largest):
        raise BadSampleError("non_finite_embedding")
    if largest > FP16_MAX:
        raise BadSampleError("embedding_overflow", f"{largest:.3g}, fp16 holds up to {FP16_MAX:.0f}")
    embedding: Embedding = hidden_LD.half().numpy()
    return embedding


def _checked_layer(model: PreTrainedModel, layer: int | None, name: str) -> int | None:
    """From the front, so that one layer has one name and one fingerprint."""
    num_states = model.config.num_hidden_layers + 1
    if layer is not None and not -num_states <= layer < num_states:
        allowed = f"{-num_states} to {num_states - 1}, or none for its output"
        raise UserError(f"text encoder {name!r} has no layer {layer}", allowed=allowed)
    return None if layer is None else layer % num_states


def _checked_max_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, name: str
) -> int:
    """``max_tokens``, or the least of what model and tokenizer state."""
    stated = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limits = [int(limit) for limit in stated if limit is not None and 0 < limit < NO_LIMIT]
    least = tokenizer.num_special_tokens_to_add() + 1
    if max_tokens is None and not limits:
        raise UserError(f"text encoder {name!r} states no maximum of tokens", do="set max_tokens")
    if max_tokens is None:
        return min(limits)
    if max_tokens < least or max_tokens > min(limits, default=max_tokens):
        allowed = f"{least} to {min(limits)}" if limits else f"at least {least}"
        raise UserError(f"text encoder {name!r} cannot take max_tokens = {max_tokens}", allowed=allowed)
    return max_tokens
