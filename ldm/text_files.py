"""A text encoder's files: finding model and tokenizer in a folder or on the hub, and reading them.

Only safetensors are read and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ldm import hub
from ldm.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TextEncoderFiles", "find", "is_unused", "read_model", "read_tokenizer"]

WEIGHTS = "model"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Keys of config.json that change with the library that wrote it, not with what the model computes.
UNSTABLE_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
ALLOWED = "a folder in transformers' or diffusers' format, or a hub id"
# What transformers lets through of its parsers when a file is damaged or a value is none.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError),
    *(SafetensorError, StrictDataclassError),
)


@dataclass(frozen=True)
class TextEncoderFiles:
    """``name`` as the user gave it; the folders ``model`` and ``tokenizer``, which may be the same."""

    name: str
    model: Path
    tokenizer: Path

    def digest(self) -> bytes:
        """sha256 over config.json, without what changes with its writer, and the tokenizer's files."""
        config = json.loads((self.model / "config.json").read_text())
        stable = {key: value for key, value in config.items() if key not in UNSTABLE_KEYS}
        digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
        for name in TOKENIZER_FILES:
            if (self.tokenizer / name).is_file():
                content = (self.tokenizer / name).read_bytes()
                digest.update(f"{name}{len(content)}".encode())
                digest.update(content)
        return digest.digest()


def find(source: str) -> TextEncoderFiles:
    """The files of a text encoder; UserError where there are none or they cannot be reached.

    source: a folder with model and tokenizer; a diffusers pipeline folder, whose ``text_encoder`` and
    ``tokenizer`` are taken; one of its text encoders (``…/text_encoder_2`` goes with
    ``…/tokenizer_2``); or the hub id of one of the first two.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not hub.is_hub_id(source):
        return _in_folder(folder, source)
    files = ("config.json", f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.index*.json", *TOKENIZER_FILES)
    below = [f"{part}/{file}" for part in ("text_encoder", "tokenizer") for file in files]
    example = "a local folder in transformers' format, such as ./clip-vit-large-patch14"
    local = hub.download(source, [*files, *below], kind="text encoder", folder_example=example)
    return _in_folder(local, source)


def read_model(files: TextEncoderFiles) -> PreTrainedModel:
    """The model in fp32 on the CPU; UserError where its files are damaged or it reads no text."""
    from transformers import AutoConfig

    # Looked for here: transformers' own message would propose the pickle file, if there is one.
    variant = _variant(files)
    try:
        with _quietly():
            config = AutoConfig.from_pretrained(files.model, local_files_only=True, trust_remote_code=False)
            config = config.get_text_config()
            model, report = _auto_class(config, files.name).from_pretrained(
                files.model,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                variant=variant,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise UserError(f"cannot load text encoder {files.name!r}: {_first_line(error)}") from error
    # Left at random values. What the file has beside them (a vision tower, say) is another part.
    missing = sorted(key for key in report["missing_keys"] if not is_unused(key))
    if missing:
        raise UserError(
            f"weights of text encoder {files.name!r} do not fit its config.json: "
            f"{len(missing)} are missing, such as {missing[0]}"
        )
    if model.main_input_name != "input_ids":
        raise UserError(f"{files.name!r} is a {type(model).__name__}, which reads no text")
    loaded: PreTrainedModel = model
    return loaded


def read_tokenizer(files: TextEncoderFiles) -> PreTrainedTokenizerBase:
    """The tokenizer that goes with the model; UserError where its files are damaged."""
    from transformers import AutoTokenizer

    try:
        with _quietly():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                files.tokenizer, local_files_only=True, trust_remote_code=False
            )
    except UNREADABLE as error:
        raise UserError(f"cannot load the tokenizer of {files.name!r}: {_first_line(error)}") from error
    return tokenizer


def is_unused(key: str) -> bool:
    """Whether a weight has no part in the hidden states: a pooler is often not in the file at all."""
    return key.startswith("pooler.")


def _in_folder(folder: Path, name: str) -> TextEncoderFiles:
    if not folder.is_dir():
        raise UserError(f"no text encoder at {name!r}", allowed=ALLOWED)
    folder = folder.resolve()
    model = folder if (folder / "config.json").is_file() else folder / "text_encoder"
    if not (model / "config.json").is_file():
        raise UserError(f"text encoder folder {name!r} has no config.json", allowed=ALLOWED)
    beside = model.with_name(model.name.replace("text_encoder", "tokenizer"))
    for tokenizer in (model, beside):
        if any((tokenizer / file).is_file() for file in TOKENIZER_FILES):
            return TextEncoderFiles(name, model, tokenizer)
    raise UserError(f"text encoder folder {name!r} has no tokenizer", do="save its tokenizer there too")


def _variant(files: TextEncoderFiles) -> str | None:
    """None for plain weights, "fp16" where there are only those."""
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        names = (f"{WEIGHTS}{suffix}.safetensors", f"{WEIGHTS}.safetensors.index{suffix}.json")
        if any((files.model / file).is_file() for file in names):
            return variant
    raise UserError(
        f"text encoder folder {files.name!r} has no weights",
        allowed=f"{WEIGHTS}.safetensors (pickle files are refused: they can run code)",
        do="save it again with save_pretrained",
    )


def _auto_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class that reads text into hidden states, without the decoder that some have."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        chosen: type[PreTrainedModel] = AutoModelForTextEncoding
        return chosen
    if config.is_encoder_decoder:
        allowed = "CLIP's text model, the encoder of a T5, or a model without a decoder"
        raise UserError(f"{name!r} is a {config.model_type}, which is no text encoder", allowed=allowed)
    chosen = AutoModel
    return chosen


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of weights that the file has beside the encoder's."""
    from transformers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
