"""Tiles against what Pillow makes of the image, which shares no code with libvips: not one pixel differs."""

import io
import subprocess
import sys
from collections.abc import Iterator
from math import ceil, log2
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from pipelines.serve.deep_zoom import write_tiles

TILE_PX = 512
NAMESPACE = "{http://schemas.microsoft.com/deepzoom/2008}"

Place = tuple[int, int, int]


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random, without edges, and nowhere flat."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def levels(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """From the image down to one pixel: the mean of 2×2 pixels, of fewer at an odd end."""
    for level in range(ceil(log2(max(image.size))), -1, -1):
        yield level, image
        image = image.reduce(2)


def as_jpeg(image: Image.Image) -> Image.Image:
    """Written with quality 90 and colours at full size, and read again."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=90, subsampling=0)
    return Image.open(file)


def expected_tiles(image: Image.Image) -> dict[Place, Image.Image]:
    """(level, x, y) → 512×512 pixels, and one more on each side where there is a neighbour."""
    expected = {}
    for level, reduced in levels(image):
        width, height = reduced.size
        for x in range(ceil(width / TILE_PX)):
            for y in range(ceil(height / TILE_PX)):
                left, top = max(0, TILE_PX * x - 1), max(0, TILE_PX * y - 1)
                right, bottom = min(width, TILE_PX * (x + 1) + 1), min(height, TILE_PX * (y + 1) + 1)
                expected[level, x, y] = as_jpeg(reduced.crop((left, top, right, bottom)))
    return expected


def tiles(folder: Path) -> dict[Place, Image.Image]:
    """(level, x, y) → tile, of all that is in the folder; nothing else may be."""
    found = {}
    for path in (folder / "tiles_files").rglob("*"):
        if path.is_file():
            assert path.suffix == ".jpg"
            x, y = path.stem.split("_")
            with Image.open(path) as tile:
                found[int(path.parent.name), int(x), int(y)] = tile.copy()
    return found


def assert_same_pixels(found: dict[Place, Image.Image], expected: dict[Place, Image.Image]) -> None:
    assert {place: tile.size for place, tile in found.items()} == {
        place: tile.size for place, tile in expected.items()
    }
    differing = [place for place, tile in found.items() if tile.tobytes() != expected[place].tobytes()]
    assert differing == []


@pytest.mark.parametrize("size", [(1301, 777), (512, 512), (513, 512), (1025, 3), (1, 1), (1024, 1537)])
def test_every_tile_of_every_level(tmp_path: Path, size: tuple[int, int]) -> None:
    image = smooth(*size)
    image.save(tmp_path / "image.png")
    write_tiles(tmp_path / "image.png", tmp_path / "tiles")

    assert_same_pixels(tiles(tmp_path / "tiles"), expected_tiles(image))


def test_description(tmp_path: Path) -> None:
    smooth(1301, 777).save(tmp_path / "image.png")
    write_tiles(tmp_path / "image.png", tmp_path / "tiles")

    root = ElementTree.parse(tmp_path / "tiles" / "tiles.dzi").getroot()
    size = root.find(f"{NAMESPACE}Size")
    described = {"Format": "jpg", "Overlap": "1", "TileSize": "512"}
    assert (root.tag, root.attrib) == (f"{NAMESPACE}Image", described)
    assert size is not None and size.attrib == {"Width": "1301", "Height": "777"}


@pytest.mark.parametrize("name", ["image.png", "image.jpeg", "image.webp", "grey.png"])
def test_every_format_that_the_server_writes(tmp_path: Path, name: str) -> None:
    smooth(600, 100).convert("L" if name.startswith("grey") else "RGB").save(tmp_path / name)
    write_tiles(tmp_path / name, tmp_path / "tiles")

    with Image.open(tmp_path / name) as image:
        image.load()
    assert_same_pixels(tiles(tmp_path / "tiles"), expected_tiles(image))


def test_what_the_file_says_about_itself_is_not_repeated_in_every_tile(tmp_path: Path) -> None:
    about = PngInfo()
    about.add_text("prompt", "a secret garden")
    exif = Image.Exif()
    exif[0x010E] = "a secret garden"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    smooth(64, 64).save(tmp_path / "image.png", pnginfo=about, exif=exif, icc_profile=profile.tobytes())
    write_tiles(tmp_path / "image.png", tmp_path / "tiles")

    assert {key for tile in (tmp_path / "tiles").rglob("*.jpg") for key in _told_by(tile)} == set()
    assert all(b"garden" not in path.read_bytes() for path in (tmp_path / "tiles").rglob("*.*"))


def _told_by(tile: Path) -> set[str]:
    with Image.open(tile) as image:
        return {str(key) for key in image.info} - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        smooth(64, 64, seed).save(tmp_path / "image.png")
        write_tiles(tmp_path / "image.png", tmp_path / str(seed))

    assert_same_pixels(tiles(tmp_path / "1"), expected_tiles(smooth(64, 64, seed=1)))
    assert_same_pixels(tiles(tmp_path / "2"), expected_tiles(smooth(64, 64, seed=2)))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_that_was_cut_short_is_an_error_and_has_no_description(tmp_path: Path, format: str) -> None:
    whole, cut = tmp_path / f"whole.{format}", tmp_path / f"cut.{format}"
    smooth(700, 700).save(whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])

    with pytest.raises(pyvips.Error):
        write_tiles(cut, tmp_path / "tiles")
    assert not (tmp_path / "tiles" / "tiles.dzi").exists()


def test_tiles_are_never_mixed_with_older_ones(tmp_path: Path) -> None:
    smooth(64, 64).save(tmp_path / "image.png")
    (tmp_path / "tiles").mkdir()

    with pytest.raises(FileExistsError):
        write_tiles(tmp_path / "image.png", tmp_path / "tiles")
    assert [*(tmp_path / "tiles").iterdir()] == []


MEASURED = """
import sys
from pathlib import Path
from pipelines.serve.deep_zoom import write_tiles

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak_bytes()
write_tiles(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak_bytes() - before)
"""


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    width, height = 1024, 32768
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(tmp_path / "tall.png")

    command = [sys.executable, "-c", MEASURED, str(tmp_path / "tall.png"), str(tmp_path / "tiles")]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)

    assert len([*(tmp_path / "tiles").rglob("*.jpg")]) > 128
    assert int(done.stdout) < width * height * 3 / 2
