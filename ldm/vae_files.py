"""Where a VAE's files lie, and reading them: a default model, a folder, a URL, or the model hub."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ldm import hub, storage
from ldm.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    DiffusersVae: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC

__all__ = ["ASSETS", "default_names", "local_folder", "read", "read_config", "weight_files"]

ASSETS = Path(__file__).parent / "assets"
CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
WEIGHTS = "diffusion_pytorch_model"


def default_names() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(p.parent.name for p in ASSETS.glob("*/config.json"))


def read(name: str) -> "DiffusersVae":
    """The VAE that `ldm.autoencoder.load` knows by ``name``, in fp32 on the CPU; UserError as there."""
    with local_folder(name) as folder:
        return _load_class(folder, name)


@contextmanager
def local_folder(name: str) -> Iterator[Path]:
    """The folder with ``config.json`` of a VAE, as long as the block runs; fetched where it is not local."""
    if "://" in name:
        with tempfile.TemporaryDirectory() as local:
            _fetch(name, Path(local))
            yield _with_config(Path(local), name)
        return
    folder = ASSETS / name if name in default_names() else Path(name).expanduser()
    is_hub_id = not folder.exists() and hub.is_hub_id(name)
    yield _with_config(_from_hub(name) if is_hub_id else folder, name)


def _with_config(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        choices = [*default_names(), "a diffusers folder", "an fsspec URL or a hub id"]
        raise UserError(f"no VAE at {name!r}", allowed=", ".join(choices))
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"VAE folder {name!r} has no config.json", do="give a folder in diffusers' format")
    return folder


def _load_class(folder: Path, name: str) -> "DiffusersVae":
    import diffusers
    import torch

    (class_name, _), variant = read_config(folder, name), _variant(folder, name)
    try:
        vae, report = getattr(diffusers, class_name).from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            variant=variant,
            local_files_only=True,
            low_cpu_mem_usage=False,  # true needs accelerate, and without it diffusers prints a notice
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"cannot load VAE {name!r}: {_first_line(error)}") from error
    # diffusers leaves weights that the file lacks at random values, and only logs it.
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise UserError(
            f"weights of VAE {name!r} do not fit its config.json: {len(wrong)} such as {wrong[0]}"
        )
    loaded: DiffusersVae = vae
    return loaded


def read_config(folder: Path, name: str) -> tuple[str, dict[str, object]]:
    """(class, config) of a VAE folder. UserError where it is none that can be used."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"config.json of VAE {name!r} is not JSON: {error}") from error
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name not in CLASSES:
        raise UserError(f"VAE {name!r} is a {class_name}", allowed=", ".join(CLASSES))
    return str(class_name), config


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that diffusers would load."""
    suffix = f".{variant}" if (variant := _variant(folder, name)) else ""
    index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
    if not index.is_file():
        return [folder / f"{WEIGHTS}{suffix}.safetensors"]
    return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _variant(folder: Path, name: str) -> str | None:
    """The ``variant`` to ask diffusers for: None for plain files, "fp16" where there are only those."""
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        names = (f"{WEIGHTS}{suffix}.safetensors", f"{WEIGHTS}.safetensors.index{suffix}.json")
        if any((folder / file).is_file() for file in names):
            return variant
    raise UserError(
        f"VAE folder {name!r} has no weights",
        allowed=f"{WEIGHTS}.safetensors (pickle files are refused: they can run code)",
        do="save it again with save_pretrained(..., safe_serialization=True)",
    )


def _from_hub(hub_id: str) -> Path:
    files = ["config.json", f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.index*.json"]
    example = "a local folder in diffusers' format, such as ./sd-vae-ft-mse"
    return hub.download(hub_id, files + [f"vae/{file}" for file in files], kind="VAE", folder_example=example)


def _fetch(url: str, local: Path) -> None:
    """Copy the files of one folder, or of a pipeline folder's ``vae/``, from a remote file system."""
    try:
        filesystem, path = storage.filesystem(url)
        remote = _listed(filesystem.ls(path, detail=False))
        if "config.json" not in remote and "vae" in remote:
            remote = _listed(filesystem.ls(remote["vae"], detail=False))
        for name, source in remote.items():
            if name.endswith((".json", ".safetensors")):
                filesystem.get_file(source, str(local / name))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read VAE {url!r}: {_first_line(error)}") from error


def _listed(paths: Iterable[str]) -> dict[str, str]:
    """Last component → path."""
    return {path.rstrip("/").rsplit("/", 1)[-1]: path for path in paths}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
