import io
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ldm.errors import BadSampleError
from ldm.greys import grey_levels
from ldm.image_tensors import from_model, to_model
from ldm.images import decode_image, encode_png, resize_short_side
from tests.ldm.bad_images import Case, black_png, cases, encoded
from tests.ldm.icc_profiles import adobe_like, adobe_to_srgb

CASES = cases()
ROOT = Path(__file__).parents[2]
ORIENTATION = 0x0112


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_corpus_from_outside(case: Case) -> None:
    if case.pixels is None:
        assert reason(case.data) == case.reason
    else:
        np.testing.assert_array_equal(np.asarray(decode_image(case.data)), case.pixels)


def test_the_corpus_has_both_kinds_and_no_name_twice() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert sum(case.pixels is None for case in CASES) >= 40 <= sum(case.pixels is not None for case in CASES)


MEASURE = """
import sys
from pathlib import Path
from ldm.images import decode_image
from ldm.errors import BadSampleError

def peak_bytes():
    # Not ru_maxrss: that survives exec, and would begin at the peak of pytest.
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

assert not {"torch", "ray"} & sys.modules.keys()
warm, *rest = map(Path, sys.argv[1:])
decode_image(warm.read_bytes())
for path in rest:
    data, before = path.read_bytes(), peak_bytes()
    try:
        decode_image(data)
    except BadSampleError as error:
        assert error.reason == "too_many_pixels", error
    print(path.name, peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")
def test_a_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    bombs = {case.name: case.data for case in CASES if case.reason == "too_many_pixels"}
    # The last one is within the limit and shows that the peak is seen.
    files = {"warm": encode_png(pixels(9, 9)), **bombs, "allowed": black_png(5_000, 5_000)}
    for name, data in files.items():
        assert len(data) < 100_000
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in files]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    rises = {name: int(rise) for name, rise in map(str.split, run.stdout.splitlines())}
    assert len(bombs) >= 10 and rises.keys() == files.keys() - {"warm"}
    assert rises.pop("allowed") > 64 * 2**20
    assert max(rises.values()) < 64 * 2**20, rises


def test_a_limit_above_that_of_pillow_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = encode_png(pixels(10, 20))
    assert reason(data, max_pixels=100) == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS == 50
    assert decode_image(data, max_pixels=201).size == (20, 10)
    # It stays raised: to lower it again would refuse what another thread has been allowed.
    assert reason(data, max_pixels=100) == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS == 101


def test_a_missing_codec_is_not_the_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for image_format in ("AVIF", "JPEG2000", "WEBP"):
        data = encoded(Image.fromarray(pixels(8, 8)), image_format)
        with monkeypatch.context() as patch:
            # Stands in for a Pillow without it: the only fact that can be taken away here.
            patch.setitem(Image.OPEN, image_format, (Image.OPEN[image_format][0], lambda _: False))
            patch.setattr("ldm.images.features.check", lambda _: False)
            assert reason(data) == "codec_missing"
        assert decode_image(data).size == (8, 8)


def test_a_profile_of_a_wide_gamut_against_its_closed_form() -> None:
    levels = pixels(16, 16)
    found = np.asarray(decode_image(encoded(Image.fromarray(levels), icc_profile=adobe_like())))
    assert np.abs(found - adobe_to_srgb(levels)).max() < 1
    assert np.abs(found.astype(int) - levels).mean() > 5


def test_12_bits_of_a_tiff_are_its_full_scale() -> None:
    image = Image.fromarray(np.array([[0, 2048, 4095]], np.uint16))
    image.tag_v2 = {258: (12,)}
    assert np.asarray(grey_levels(image)).tolist() == [[0, 128, 255]]


def test_unsigned_32_bits_are_not_read_as_signed() -> None:
    tiff = TiffImagePlugin.ImageFileDirectory_v2()
    values = np.array([0, 2**31, 2**32 - 1], "<u4").tobytes()
    for tag, value in {256: 3, 257: 1, 258: 32, 259: 1, 262: 1, 273: 0, 278: 1, 279: 12, 339: 1}.items():
        tiff[tag] = value
    buffer = io.BytesIO()
    tiff.save(buffer)
    assert np.asarray(decode_image(buffer.getvalue() + values))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((16, 40), (16, 40)), ((1, 3), (16, 48))],
)
def test_resize_short_side_keeps_the_aspect(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_short_side(Image.new("RGB", size), 16).size == expected


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
