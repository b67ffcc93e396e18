"""What a run reads and makes, told apart by fingerprint: shards, datasets, checkpoints, VAEs, files.

| kind | fingerprint |
|---|---|
| shards, images | names and versions of the shards that are listed: size and time, ETag on S3 |
| dataset | header and ids of the units that count: another one when rows are added |
| vae | `ldm.vae_identity`: structure and weights, wherever the files are |
| checkpoint, model | files of the U-Net: ``U-Net sha256`` of an evaluation's page |
| file | its bytes |
| folder | names and sizes |
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from jobs.evaluation_view import folder_sha256
from jobs.run_record import Artifact, is_of_a_run
from ldm import storage
from ldm.errors import UserError

__all__ = ["absolute", "dataset_fingerprint", "file_sha256", "identify", "identify_vae", "listing_sha256"]


def identify(source: str) -> Artifact | None:
    """What lies there; None where nothing does. source: a path or URL; of a row of a dataset: DATASET#KEY.

    UserError or OSError where it cannot be read.
    """
    source = source.rpartition("#")[0] or source
    filesystem, path = storage.filesystem(source)
    filesystem.invalidate_cache()
    if filesystem.isfile(path):
        return _of_file(filesystem, path, source)
    if not filesystem.isdir(path):
        return None
    for kind in (_dataset, _checkpoint, _model, _vae, _shards):
        found = kind(source)
        if found is not None:
            return found
    return _of_folder(filesystem, path, source)


def identify_vae(name: str) -> Artifact:
    """As `identify`, of whatever `ldm.autoencoder.load` knows by ``name``; the hub is asked for its ids."""
    from ldm.vae_identity import identify as vae_identity
    from pipelines.vae_source import on_every_node

    url = absolute(name) if "://" in name else on_every_node(name)
    return Artifact(kind="vae", url=url, fingerprint=vae_identity(name).fingerprint)


def absolute(url: str) -> str:
    """As another process finds it: a local path in full, a URL as it is."""
    filesystem, path = storage.filesystem(url)
    return path if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(path))


def dataset_fingerprint(header_sha256: str, units_sha256: str) -> str:
    """Of a latent dataset; a checkpoint's ``run.json`` holds both parts."""
    return hashlib.sha256(f"{header_sha256}\n{units_sha256}".encode()).hexdigest()


def file_sha256(filesystem: AbstractFileSystem, path: str) -> str:
    """Of its bytes."""
    with filesystem.open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def listing_sha256(filesystem: AbstractFileSystem, path: str) -> str:
    """Of names and sizes in a folder, without records of runs; empty where there is nothing else."""
    found = filesystem.find(path, detail=True) if filesystem.exists(path) else {}
    inside = ((name[len(path) :], info["size"]) for name, info in found.items())
    entries = sorted(entry for entry in inside if not is_of_a_run(entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest() if entries else ""


def _dataset(source: str) -> Artifact | None:
    from pipelines.dataset import read_header

    filesystem, root = storage.filesystem(source)
    header = read_header(filesystem, root)
    if header is None:
        return None
    units = ""
    with suppress(FileNotFoundError):  # nothing was committed yet
        units = str(json.loads(filesystem.cat_file(f"{root}/stats.json"))["units_sha256"])
    fingerprint = dataset_fingerprint(hashlib.sha256(header.json_bytes()).hexdigest(), units)
    made_of = {"vae": header.vae_fingerprint}
    return Artifact(kind="dataset", url=absolute(source), fingerprint=fingerprint, made_of=made_of)


def _checkpoint(source: str) -> Artifact | None:
    folder = Path(source).expanduser()
    if not (folder / "ldm.json").is_file():
        return None
    # Not by `ldm.checkpoint`, which imports torch.
    info: Mapping[str, object] = json.loads((folder / "ldm.json").read_bytes())
    made_of = {"vae": str(info["vae_fingerprint"]), **_trained_on(folder)}
    return Artifact(
        kind="checkpoint", url=absolute(source), fingerprint=folder_sha256(folder / "unet"), made_of=made_of
    )


def _trained_on(folder: Path) -> dict[str, str]:
    """Of the run that the checkpoint is of, where its record is still beside it."""
    try:
        run = json.loads((folder / "run.json").read_bytes())
        parts = str(run["dataset.header"]), str(run["dataset.units"])
    except (FileNotFoundError, KeyError):
        return {}
    return {"dataset": dataset_fingerprint(*parts)}


def _model(source: str) -> Artifact | None:
    unet = Path(source).expanduser() / "unet"
    if not unet.is_dir():
        return None
    return Artifact(kind="model", url=absolute(source), fingerprint=folder_sha256(unet))


def _vae(source: str) -> Artifact | None:
    filesystem, path = storage.filesystem(source)
    if not filesystem.isfile(f"{path}/config.json"):
        return None
    try:
        return identify_vae(source)
    except UserError:  # the config of something else
        return None


def _shards(source: str) -> Artifact | None:
    from pipelines.shards import list_shards
    from pipelines.shards.shard import split_url, version_of_all

    try:
        shards = list_shards(source)
    except UserError:  # a folder of other things
        return None
    kind = "images" if split_url(shards[0])[1] == "folder" else "shards"
    version = version_of_all(part for shard in shards for part in (shard.name, shard.version))
    return Artifact(kind=kind, url=absolute(source), fingerprint=version)


def _of_file(filesystem: AbstractFileSystem, path: str, source: str) -> Artifact | None:
    from pipelines.shards.listing import SHARD_SUFFIXES

    if path.endswith(SHARD_SUFFIXES):
        return _shards(source)
    return Artifact(kind="file", url=absolute(source), fingerprint=file_sha256(filesystem, path))


def _of_folder(filesystem: AbstractFileSystem, path: str, source: str) -> Artifact | None:
    digest = listing_sha256(filesystem, path)
    return Artifact(kind="folder", url=absolute(source), fingerprint=digest) if digest else None
