"""Packing a folder of pictures into WebDataset shards. Sub-folder = class, ``.txt`` beside = caption."""

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from ldm.errors import BadSampleError, UserError
from ldm.images import decode_image, encode_png, resize_short_side
from ldm.seeds import keyed_seed
from pipelines.class_names import CLASSES_FILE, class_names_bytes
from pipelines.shards import IMAGE_EXTENSIONS, Sample, write_tar

__all__ = ["Packed", "Packing", "Picture", "find_pictures", "pack"]

MAX_KEY_TEXT = 60  # with digest, crop number and extension a name stays below the 100 bytes of a tar header


class Packing(BaseModel, frozen=True, extra="forbid"):
    """What is made of each picture, and how many samples go into a shard."""

    resize_px: NonNegativeInt | None = Field(
        None, description="short side of larger pictures; without it files stay as they are"
    )
    crop_px: PositiveInt | None = Field(None, description="side of random square crops")
    crops_per_image: PositiveInt = Field(1, description="crops of each picture")
    zoom_max: float = Field(
        2.0, ge=1.0, description="a crop shows the short side, or down to 1/zoom_max of it"
    )
    samples_per_shard: PositiveInt = Field(1000, description="samples in a tar")
    seed: int = Field(0, description="of the crops")

    @model_validator(mode="after")
    def _one_way(self) -> "Packing":
        if self.resize_px and self.crop_px:
            raise ValueError("resize_px and crop_px cannot both be given; a crop is scaled anyway")
        return self


@dataclass(frozen=True)
class Picture:
    """A picture file: ``source`` is its path below the folder, ``label`` the index of its class."""

    path: Path
    source: str
    label: int | None
    class_name: str | None

    @property
    def key(self) -> str:
        """A name that tells the source, is unique, and has no dot: a key ends at the first one."""
        text = re.sub(r"[^A-Za-z0-9]+", "_", self.source.rpartition(".")[0]).strip("_")[:MAX_KEY_TEXT]
        return f"{text}-{hashlib.sha256(self.source.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Packed:
    """What was written, and the pictures that could not be used, by reason."""

    shards: int
    samples: int
    class_names: tuple[str, ...]
    skipped: dict[str, int]


def find_pictures(folder: Path) -> tuple[list[Picture], list[str]]:
    """The pictures below a folder in name order, and the class names (sub-folders with pictures).

    UserError where there is no folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", do="give a folder of images; sub-folders are classes")
    sources = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_picture(path))
    if not sources:
        raise UserError(f"no image in {folder}", allowed=", ".join(f"*.{e}" for e in IMAGE_EXTENSIONS))
    names = sorted({source.split("/")[0] for source in sources if "/" in source})
    return [_picture(folder, source, names) for source in sources], names


def pack(folder: Path, out: Path, packing: Packing) -> Packed:
    """Write ``shard-000000.tar`` … and, where there are classes, ``classes.json``.

    The folder ``out`` appears when it is whole; equal pictures and options give equal bytes.
    UserError where ``out`` is there already and not empty, or no picture could be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already", do="give a folder that is new or empty")
    pictures, names = find_pictures(folder)
    skipped: Counter[str] = Counter()
    samples = _samples(pictures, packing, skipped)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        partial = Path(scratch) / "shards"
        partial.mkdir()
        counts = _write_shards(partial, samples, packing.samples_per_shard)
        if not counts:
            raise UserError(f"no image in {folder} can be used ({dict(skipped)})")
        if names:
            (partial / CLASSES_FILE).write_bytes(class_names_bytes(names))
        partial.replace(out)
    return Packed(len(counts), sum(counts), tuple(names), dict(sorted(skipped.items())))


def _is_picture(path: Path) -> bool:
    known = path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
    return known and path.is_file() and not path.name.startswith(".")


def _picture(folder: Path, source: str, names: Sequence[str]) -> Picture:
    class_name = source.split("/", 1)[0] if "/" in source else None
    label = None if class_name is None else names.index(class_name)
    return Picture(folder / source, source, label, class_name)


def _write_shards(folder: Path, samples: Iterator[Sample], samples_per_shard: int) -> list[int]:
    counts: list[int] = []
    while first := next(samples, None):
        rest = islice(samples, samples_per_shard - 1)
        path = folder / f"shard-{len(counts):06d}.tar"
        counts.append(write_tar(path, (sample for part in ((first,), rest) for sample in part)))
    return counts


def _samples(pictures: Sequence[Picture], packing: Packing, skipped: Counter[str]) -> Iterator[Sample]:
    render = _renderer(packing)
    for picture in pictures:
        try:
            images = render(picture)
        except BadSampleError as error:
            skipped[error.reason] += 1
            continue
        whole = Sample(picture.key, None, _fields(picture))
        for index, image in enumerate(images):
            key = picture.key if packing.crop_px is None else f"{picture.key}-{index:03d}"
            yield replace(whole, key=key, image=image)


def _fields(picture: Picture) -> dict[str, bytes]:
    record: dict[str, object] = {"source": picture.source}
    if picture.label is not None:
        record |= {"label": picture.label, "class": picture.class_name}
    fields = {"json": json.dumps(record, sort_keys=True, ensure_ascii=False).encode()}
    caption = picture.path.with_suffix(".txt")
    if caption.is_file():
        fields["txt"] = caption.read_bytes().strip()
    return fields


def _renderer(packing: Packing) -> Callable[[Picture], list[bytes]]:
    """Picture → the image files of its samples."""
    if packing.crop_px is not None:
        crop_px = packing.crop_px
        return lambda picture: _crops(picture, packing, crop_px)
    if packing.resize_px:
        size_px = packing.resize_px
        return lambda picture: [encode_png(np.asarray(_reduced(_decoded(picture), size_px)))]
    return lambda picture: [picture.path.read_bytes()]


def _reduced(image: Image.Image, size_px: int) -> Image.Image:
    # To magnify would add bytes and no detail.
    return resize_short_side(image, size_px) if min(image.size) > size_px else image


def _crops(picture: Picture, packing: Packing, crop_px: int) -> list[bytes]:
    image = _decoded(picture)
    crops = []
    for index in range(packing.crops_per_image):
        seed = keyed_seed("crop", packing.seed, picture.key, index)
        rng = np.random.Generator(np.random.Philox(seed))
        left, top, side = _crop_box(image.size, crop_px, packing.zoom_max, rng)
        box = (left, top, left + side, top + side)
        crop = image.resize((crop_px, crop_px), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        crops.append(encode_png(np.asarray(crop)))
    return crops


def _crop_box(
    size: tuple[int, int], crop_px: int, zoom_max: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """(left, top, side) of a random square; no zoom that would magnify, unless the picture is too small."""
    short = min(size)
    zoom = rng.uniform(1.0, max(1.0, min(zoom_max, short / crop_px)))
    side = short / zoom
    return rng.uniform(0.0, size[0] - side), rng.uniform(0.0, size[1] - side), side


def _decoded(picture: Picture) -> Image.Image:
    return decode_image(picture.path.read_bytes())
