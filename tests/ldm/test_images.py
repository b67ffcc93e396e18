import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from ldm.errors import BadSampleError
from ldm.image_tensors import from_model, to_model
from ldm.images import Preprocess, decode_image, encode_png, resize_short_side

ORIENTATION = 0x0112


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def black_png(width: int, height: int) -> bytes:
    """A valid 1-bit black PNG, made without holding its pixels."""
    deflate = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data, **options)
    return caught.value.reason


def test_rgb_is_unchanged() -> None:
    image = decode_image(encode_png(pixels(5, 7)))
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert np.array_equal(np.asarray(image), pixels(5, 7))


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_the_background(mode: str, background: str, level: int) -> None:
    image = Image.new("RGBA", (3, 1), (100, 100, 100, 255))
    image.putpixel((1, 0), (100, 100, 100, 51))
    image.putpixel((2, 0), (100, 100, 100, 0))
    row = np.asarray(decode_image(encoded(image.convert(mode)), background=background))[0]
    # 51 / 255 = 0.2: source over background (Porter & Duff 1984).
    assert row.tolist() == [[100] * 3, [round(0.2 * 100 + 0.8 * level)] * 3, [level] * 3]


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("black", 0)])
def test_a_transparent_palette_entry_is_background(background: str, level: int) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    row = np.asarray(decode_image(encoded(image, transparency=1), background=background))[0]
    assert row.tolist() == [[10, 20, 30], [level] * 3]


def test_grey_becomes_three_equal_channels() -> None:
    grey = pixels(4, 6)[..., 0]
    found = np.asarray(decode_image(encoded(Image.fromarray(grey))))
    assert np.array_equal(found, grey[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(image_format: str) -> None:
    grey = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], dtype=np.uint16)
    found = np.asarray(decode_image(encoded(Image.fromarray(grey), image_format)))
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert found.shape == (1, 8, 3)


def test_cmyk_is_turned_into_light() -> None:
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    found = np.asarray(decode_image(encoded(inks, "JPEG", quality=95))).reshape(-1, 3)
    assert np.abs(found.astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "first_row"),
    [(1, [1, 2]), (2, [2, 1]), (3, [4, 3]), (4, [3, 4]), (6, [3, 1]), (8, [2, 4])],
)
def test_the_orientation_of_a_camera_is_applied(orientation: int, first_row: list[int]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.array([[1, 2], [3, 4], [5, 6]][:2], dtype=np.uint8))
    found = decode_image(encoded(image, exif=exif))
    assert np.asarray(found)[0, :, 0].tolist() == first_row


def test_an_upright_image_has_its_sides_exchanged() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert decode_image(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF"])
def test_half_a_file_is_truncated(image_format: str) -> None:
    data = encoded(Image.fromarray(pixels(64, 64)), image_format)
    assert reason(data[: len(data) // 2]) == "truncated_image"


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(1000)])
def test_other_bytes_are_no_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


def test_a_format_that_starts_another_program_is_no_image() -> None:
    assert reason(encoded(Image.fromarray(pixels(8, 8)), "EPS")) == "not_an_image"


def test_damaged_bytes_are_a_bad_sample_and_nothing_else() -> None:
    source, originals = random.Random(0), []
    for image_format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF", "PPM"):
        originals.append(encoded(Image.fromarray(pixels(12, 12)), image_format))
    reasons = set()
    for _ in range(700):
        data = bytearray(source.choice(originals))
        for _ in range(source.choice((1, 4))):
            data[source.randrange(min(len(data), 200))] = source.randrange(256)
        try:
            assert decode_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
        except BadSampleError as error:
            reasons.add(error.reason)
    assert {"not_an_image", "truncated_image"} <= reasons


@pytest.mark.parametrize("side", [9_900, 20_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    # 98 and 400 Mpx: below and above the number at which Pillow itself refuses.
    data = black_png(side, side)
    assert len(data) < 100_000
    tracemalloc.start()
    try:
        assert reason(data, max_pixels=90_000_000) == "too_many_pixels"
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_the_pixel_limit_is_the_last_that_is_allowed() -> None:
    data = encode_png(pixels(10, 20))
    assert decode_image(data, max_pixels=200).size == (20, 10)
    assert reason(data, max_pixels=199) == "too_many_pixels"


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (33, 32), (32, 33), (31, 300), (500, 333)])
def test_every_size_becomes_the_square(size: tuple[int, int]) -> None:
    found = Preprocess(size_px=32)(encoded(Image.new("RGB", size, (10, 200, 30))))
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(found, np.broadcast_to(np.uint8([10, 200, 30]), found.shape))


def test_a_thread_of_an_image_does_not_fill_the_memory() -> None:
    # Its whole enlargement to 256 × 2,560,000,000 pixels would take two terabytes.
    found = Preprocess(size_px=256)(black_png(10_000_000, 1))
    assert found.shape == (256, 256, 3)


def test_pixels_of_the_wanted_size_are_cropped_and_not_filtered() -> None:
    image = pixels(16, 21)
    assert np.array_equal(Preprocess(size_px=16)(encode_png(image)), image[:, 2:18])


def test_the_crop_is_the_middle() -> None:
    # Red, green and blue thirds: a square in the middle is green alone.
    image = np.zeros((40, 120, 3), dtype=np.uint8)
    image[:, :40, 0] = image[:, 40:80, 1] = image[:, 80:, 2] = 255
    found = Preprocess(size_px=20)(encode_png(image)).astype(int)
    assert abs(found[:, 3:-3] - [0, 255, 0]).max() <= 1
    # The filter sees what lies beyond the crop: a little of red on the left, of blue on the right.
    assert found[:, 0].tolist() == found[:, -1, ::-1].tolist()
    assert 5 < found[0, 0, 0] < 25


def test_a_reduction_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    found = Preprocess(size_px=16)(encode_png(stripes)).astype(int)
    assert abs(found[2:-2, 2:-2] - 127.5).max() < 8


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((16, 40), (16, 40)), ((1, 3), (16, 48))],
)
def test_resize_short_side_keeps_the_aspect(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_short_side(Image.new("RGB", size), 16).size == expected


@pytest.mark.parametrize("options", [{"size_px": 0}, {"crop": "random"}, {"sizes_px": 3}])
def test_an_unknown_preprocessing_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(options)


def test_all_256_levels_survive_the_model_range() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = to_model(levels)
    assert (x.shape, x.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(from_model(x), levels)
    assert np.array_equal(from_model(x.half()), levels)


def test_from_model_clamps_and_rounds_to_nearest() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    # ±0.5 are levels 63.75 and 191.25.
    assert from_model(x)[0, 0, :, 0].tolist() == [0, 0, 64, 191, 255, 255]


def test_channels_and_rows_keep_their_places() -> None:
    image = pixels(3, 5)
    x = to_model(image[None])
    assert x[0, 2, 1, 4] == torch.tensor(image[1, 4, 2] / 127.5 - 1).float()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(from_model(x)[0])))), image)
