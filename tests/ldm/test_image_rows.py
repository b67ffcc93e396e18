"""Images written in bands, read back by other libraries."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldm import image_rows
from ldm.errors import UserError
from ldm.image_rows import check_suffix, write_image

IMAGE = np.random.default_rng(0).integers(0, 256, (300, 530, 3), dtype=np.uint8)


def bands(step: int = 64) -> Iterator[np.ndarray]:
    return (IMAGE[row : row + step] for row in range(0, len(IMAGE), step))


def read(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(io.BytesIO(path.read_bytes())))


@pytest.mark.parametrize("name", ["new/a.png", "a.tif", "a.TIFF", "a.npy"])
@pytest.mark.parametrize("size", [(300, 530), (257, 511)])
def test_what_is_written_is_read(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    write_image(tmp_path / name, bands(), size)
    np.testing.assert_array_equal(read(tmp_path / name), IMAGE[: size[0], : size[1]])
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_large_tiffs_are_big_and_all_are_tiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "small.tif", bands(), IMAGE.shape[:2])
    monkeypatch.setattr(image_rows, "MAX_PLAIN_TIFF_BYTES", 1000)
    write_image(tmp_path / "big.tif", bands(), IMAGE.shape[:2])
    for name, is_big in (("small", False), ("big", True)):
        with tifffile.TiffFile(tmp_path / f"{name}.tif") as file:
            assert (file.is_bigtiff, file.pages.first.is_tiled) == (is_big, True)
            np.testing.assert_array_equal(file.asarray(), IMAGE)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.npy"])
def test_a_cancelled_run_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    def cancelled() -> Iterator[np.ndarray]:
        yield IMAGE[:64]
        raise KeyboardInterrupt

    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / name, cancelled(), IMAGE.shape[:2])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"before"}


def test_rows_that_are_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="300 rows for an image of 301"):
        write_image(tmp_path / "a.png", bands(), (301, 530))


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"output a.jpg has no known format; allowed: a name that ends in .png,"
    ):
        check_suffix(Path("a.jpg"))
