"""A direction as a file: safetensors, with what it is of in the metadata."""

import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ldm.directions import Direction
from ldm.errors import UserError

__all__ = ["read_direction", "write_direction"]

FORMAT = "ldm-direction-1"
ABOUT = ("attribute", "against", "method", "vae", "vae_fingerprint")


def write_direction(direction: Direction, path: Path) -> None:
    """The file appears when it is whole."""
    tensors = {"step": direction.step_Chw}
    if direction.weight_Chw is not None:
        tensors["weight"] = direction.weight_Chw
    numbers = {"origin": repr(direction.origin), "bias": repr(direction.bias)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(
        safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"format": FORMAT, **numbers, **direction.about},
        )
    )
    part.replace(path)


def read_direction(path: Path) -> Direction:
    """UserError where ``path`` is no file that `write_direction` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read direction {path}: {error}", do="make one with ldm direction") from error
    if metadata.get("format") != FORMAT or "step" not in tensors or not metadata.keys() >= set(ABOUT):
        raise UserError(f"{path} holds no direction", do="make one with ldm direction")
    return Direction(
        tensors["step"],
        float(metadata["origin"]),
        {name: metadata[name] for name in ABOUT},
        tensors.get("weight"),
        float(metadata["bias"]),
    )
