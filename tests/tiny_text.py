"""Text encoders of a few kilobytes with real tokenizers, made offline: random weights, real formats."""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging

WIDTH = 16
CLIP_MAX_TOKENS = 77
T5_MAX_TOKENS = 64


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level pairs, so that any text has tokens: all bytes, and two merges that make ``the``."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>")]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_MAX_TOKENS)


def t5_tokenizer(max_tokens: int | None = T5_MAX_TOKENS) -> T5Tokenizer:
    """Unigrams: the small letters and one word; everything else is the unknown token."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    letters = [(letter, -4.0 - index / 100) for index, letter in enumerate(string.ascii_lowercase)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=max_tokens)


def clip_config() -> CLIPTextConfig:
    """Three layers, as wide as `WIDTH`."""
    size = len(clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_MAX_TOKENS,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


def t5_config() -> T5Config:
    """Two layers, as wide as `WIDTH`."""
    return T5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)


def save_clip(folder: Path, *, seed: int = 0, with_projection: bool = False) -> Path:
    """A CLIP text model and its tokenizer in one folder."""
    model_class = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    save_random(model_class, clip_config(), folder, seed)
    clip_tokenizer().save_pretrained(folder)
    return folder


def save_t5(folder: Path, *, seed: int = 0, max_tokens: int | None = T5_MAX_TOKENS) -> Path:
    """The encoder of a T5 and its tokenizer in one folder."""
    save_random(T5EncoderModel, t5_config(), folder, seed)
    t5_tokenizer(max_tokens).save_pretrained(folder)
    return folder


def save_random(
    model_class: type[PreTrainedModel], config: CLIPTextConfig | T5Config, folder: Path, seed: int
) -> PreTrainedModel:
    """A model with random weights that differ from those of another seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
    with without_progress_bar():
        model.save_pretrained(folder)
    return model


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """transformers draws one even for a model of one file."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
