"""Which VAE lies in a folder: its fingerprint and geometry, from the files alone.

The driver of a job knows a VAE by this without importing torch and diffusers (8 s and 900 MB on the
machine of docs/benchmarks.md). The actors, which load it, compute the same fingerprint of the module.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ldm import vae_files
from ldm.errors import UserError
from ldm.fingerprint import NamedArray, sha256_of

__all__ = ["VaeIdentity", "check_size", "fingerprint_of", "identify", "spatial_factor"]

Config: TypeAlias = Mapping[str, object]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
MAX_HEADER_BYTES = 100_000_000

# Every key that decides what a class computes, with diffusers' default: files leave out some that have
# it, and those written before a key existed leave out that one. Scale and shift are the caller's to apply.
STRUCTURE: Mapping[str, Config] = {
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "latent_magnitude": 3,
        "latent_shift": 0.5,
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": "relu",
    },
}
# What the attention's weights were called before diffusers 0.13, which still reads them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VaeIdentity:
    """fingerprint: see `fingerprint_of`; f pixels per latent along a side; channels of a latent."""

    fingerprint: str
    f: int
    channels: int


def identify(name: str) -> VaeIdentity:
    """The VAE that `ldm.autoencoder.load` knows by ``name``.

    UserError as there, apart from weights that do not fit the config: only loading shows those.
    """
    with vae_files.local_folder(name) as folder:
        class_name, config = vae_files.read_config(folder, name)
        full = {**STRUCTURE[class_name], **config}
        try:
            with _weights(folder, name) as tensors:
                fingerprint = fingerprint_of(class_name, config, tensors)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"cannot read the weights of VAE {name!r}: {error}") from error
        return VaeIdentity(fingerprint, spatial_factor(full), int(str(full["latent_channels"])))


def fingerprint_of(class_name: str, config: Config, weights: Iterable[NamedArray]) -> str:
    """`ldm.fingerprint.sha256_of` a VAE with this config."""
    structure = {key: config.get(key, default) for key, default in STRUCTURE[class_name].items()}
    return sha256_of(class_name, structure, weights)


def spatial_factor(config: Config) -> int:
    """Pixels per latent along one side, from the config of any of the three classes."""
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    assert isinstance(blocks, list | tuple)
    return int(2 ** (len(blocks) - 1))


def check_size(name: str, f: int, height: int, width: int) -> None:
    """UserError unless both sides (pixels) are positive multiples of ``f``, that of VAE ``name``."""
    if height <= 0 or width <= 0 or height % f or width % f:
        up = [max(f, -(-side // f) * f) for side in (width, height)]
        raise UserError(
            f"an image of {width}×{height} pixels does not fit VAE {name}",
            allowed=f"sides that are multiples of {f}",
            do=f"use {up[0]}×{up[1]}",
        )


@contextmanager
def _weights(folder: Path, name: str) -> Iterator[Iterator[NamedArray]]:
    """Every tensor of a folder's safetensors files, by name; the files are mapped, not read into memory."""
    found: dict[str, tuple[tuple[int, ...], NDArray[np.generic]]] = {}
    for path in vae_files.weight_files(folder, name):
        for key, shape, raw in _safetensors(path):
            found[_present_name(key)] = (shape, raw)
    yield ((key, *_as_fp32(*found[key])) for key in sorted(found))


def _safetensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], NDArray[np.generic]]]:
    """(name, shape, values as stored) of a file: 8 bytes of length, a JSON header, the tensors' bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} is {entry['dtype']}; allowed: {', '.join(DTYPES)}")
        dtype: np.dtype[np.generic] = DTYPES[entry["dtype"]]
        values = np.frombuffer(data[begin:end], dtype)
        yield key, tuple(entry["shape"]), values.reshape(entry["shape"])


def _as_fp32(
    shape: tuple[int, ...], values: NDArray[np.generic]
) -> tuple[tuple[int, ...], NDArray[np.float32]]:
    if values.dtype == DTYPES["BF16"]:  # the upper half of a float32
        return shape, (values.astype("<u4") << 16).view("<f4").reshape(shape)
    return shape, values.astype("<f4")


def _present_name(key: str) -> str:
    head, _, last = key.rpartition(".")
    parent, _, part = head.rpartition(".")
    if ".attentions." in key and part in OLD_NAMES:
        return f"{parent}.{OLD_NAMES[part]}.{last}"
    return key
