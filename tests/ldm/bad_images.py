"""A corpus of images as they come from outside: over 100 kinds, each with what must become of it.

A good one carries its expected pixels, by an expression in Pillow or numpy that does not go through
`ldm`; a bad one the reason code with which it must be refused.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from tests.ldm.icc_profiles import adobe_like, inks, linear_grey

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112
PHOTO_SIZE = (37, 24)


class Case(NamedTuple):
    """``pixels``: (H, W, 3) of a good image; None of one that is refused with ``reason``."""

    name: str
    data: bytes
    pixels: Pixels | None
    reason: str = ""


def cases() -> list[Case]:
    """All kinds, in a fixed order, names unique."""
    groups = (
        _damaged(),
        _foreign(),
        _bombs(),
        _oriented(),
        _profiled(),
        _transparent(),
        _greys(),
        _formats(),
    )
    return [case for group in groups for case in group]


def picture() -> Image.Image:
    """A smooth colour gradient with a sharp frame, in which every corner differs."""
    y, x = np.mgrid[0 : PHOTO_SIZE[1], 0 : PHOTO_SIZE[0]]
    levels = np.stack([x * 6, y * 10, 255 - x * 3 - y * 5], axis=-1).astype(np.uint8)
    levels[0], levels[:, -1] = (250, 20, 30), (10, 240, 40)
    return Image.fromarray(levels)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def black_png(width: int, height: int, bits: int = 1) -> bytes:
    """A valid grey PNG of one level, made without holding its pixels."""
    deflate = zlib.compressobj(9)
    row = bytes(1 + -(-width * bits // 8))
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _good(name: str, data: bytes, expected: Image.Image | Pixels | None = None) -> Case:
    """Expected by default what Pillow itself decodes."""
    image = Image.open(io.BytesIO(data)).convert("RGB") if expected is None else expected
    return Case(name, data, np.asarray(image))


def _bad(name: str, data: bytes, reason: str = "not_an_image") -> Case:
    return Case(name, data, None, reason)


def _damaged() -> Iterator[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for image_format in ("PNG", "JPEG", "TIFF", "BMP", "PPM"):
        data = encoded(noise, image_format)
        for percent in (25, 50, 90):
            cut = data[: len(data) * percent // 100]
            # The directory of a TIFF is at its end: without it there is no image.
            reason = "not_an_image" if image_format == "TIFF" and _opens(cut) is False else "truncated_image"
            yield _bad(f"{image_format.lower()}_cut_at_{percent}", cut, reason)
    png = encoded(noise)
    yield _bad("png_signature_alone", png[:8])
    yield _bad("png_header_alone", png[:33])
    broken = bytearray(png)
    broken[29] ^= 1  # in the check sum of IHDR
    yield _bad("png_crc_of_the_header", bytes(broken))
    broken = bytearray(png)
    broken[len(png) // 2] ^= 255
    yield _bad("png_flipped_byte", bytes(broken), "truncated_image")
    yield _bad("jpeg_start_alone", b"\xff\xd8\xff")
    yield _bad("gif_cut", encoded(noise.convert("P"), "GIF")[:-400], "truncated_image")


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data))
    except OSError:
        return False
    return True


def _foreign() -> Iterator[Case]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("picture.png", encoded(picture()))
    for name, data in {
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"this is no image\n" * 20,
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "json": b'{"error": "forbidden"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zip": archive.getvalue(),
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        "mp4": b"\0\0\0\x18ftypisom" + bytes(40),
        "heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(400),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/x) (w) file\nshowpage\n",
    }.items():
        yield _bad(name, data)
    for image_format in ("EPS", "PDF", "ICO", "TGA"):
        yield _bad(image_format.lower(), encoded(picture(), image_format))


def _bombs() -> Iterator[Case]:
    for side in (9_000, 13_000, 20_000):
        yield _bad(f"png_{side**2 // 10**6}_megapixels", black_png(side, side), "too_many_pixels")
    yield _bad("png_81_megapixels_of_8_bits", black_png(9_000, 9_000, bits=8), "too_many_pixels")
    yield _bad("png_of_the_largest_sides", _png_header(2**31 - 1, 2**31 - 1), "too_many_pixels")
    gif = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield _bad("gif_4295_megapixels", bytes(gif), "too_many_pixels")
    jpeg = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    yield _bad("jpeg_4290_megapixels", bytes(jpeg), "too_many_pixels")
    bmp = bytearray(encoded(Image.new("L", (1, 1)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    yield _bad("bmp_900_megapixels", bytes(bmp), "too_many_pixels")
    yield _bad("ppm_10000_megapixels", b"P6 100000 100000 255\n\0\0\0", "too_many_pixels")
    yield _bad("webp_268_megapixels", _large_webp(16_383), "too_many_pixels")
    yield _bad("webp_81_megapixels", _large_webp(9_000), "too_many_pixels")
    tiff = TiffImagePlugin.ImageFileDirectory_v2()
    tiff[256] = tiff[257] = 20_000
    tiff[258], tiff[259], tiff[262], tiff[273], tiff[278], tiff[279] = 8, 1, 1, 8, 20_000, 1
    buffer = io.BytesIO()
    tiff.save(buffer)
    yield _bad("tiff_400_megapixels", buffer.getvalue(), "too_many_pixels")


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body


def _large_webp(side: int) -> bytes:
    """A small lossless frame on a canvas of side² pixels."""
    frame = encoded(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    canvas = (side - 1).to_bytes(3, "little") * 2
    parts = b"VP8X" + struct.pack("<IB3x", 10, 2) + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body = bytes(6) + (1).to_bytes(3, "little") * 2 + bytes(4) + frame
    parts += b"ANMF" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def _oriented() -> Iterator[Case]:
    transpose = Image.Transpose
    upright = (
        None,
        transpose.FLIP_LEFT_RIGHT,
        transpose.ROTATE_180,
        transpose.FLIP_TOP_BOTTOM,
        transpose.TRANSPOSE,
        transpose.ROTATE_270,
        transpose.TRANSVERSE,
        transpose.ROTATE_90,
    )
    for number, method in enumerate(upright, start=1):
        exif = Image.Exif()
        exif[ORIENTATION] = number
        expected = picture() if method is None else picture().transpose(method)
        yield _good(f"orientation_{number}", encoded(picture(), exif=exif), expected)
    exif[ORIENTATION] = 6
    yield _good("orientation_in_tiff", encoded(picture(), "TIFF", exif=exif), picture().transpose(upright[5]))
    exif[ORIENTATION] = 9
    yield _good("orientation_unknown", encoded(picture(), exif=exif), picture())
    for name, block in {
        "text": b"Exif\0\0nonsense",
        "cut": b"Exif\0\0MM\0\x2a\0\0",
        "empty": b"Exif\0\0",
    }.items():
        yield _good(f"exif_{name}", encoded(picture(), "JPEG", exif=block))


def _profiled() -> Iterator[Case]:
    plain = picture()
    srgb = ImageCms.createProfile("sRGB")
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(adobe_like()))
    converted = ImageCms.profileToProfile(plain, adobe, srgb, outputMode="RGB")
    yield _good("icc_wide_gamut", encoded(plain, icc_profile=adobe_like()), converted)
    of_srgb = ImageCms.ImageCmsProfile(srgb).tobytes()
    yield _good("icc_srgb", encoded(plain, icc_profile=of_srgb), plain)
    grey = plain.convert("L")
    linear = ImageCms.ImageCmsProfile(io.BytesIO(linear_grey()))
    converted = ImageCms.profileToProfile(grey, linear, srgb, outputMode="RGB")
    yield _good("icc_grey", encoded(grey, icc_profile=linear_grey()), converted)
    converted = ImageCms.profileToProfile(grey.convert("RGB"), adobe, srgb, outputMode="RGB")
    yield _good("icc_of_colours_on_grey", encoded(grey, icc_profile=adobe_like()), converted)
    yield _good("icc_of_grey_on_colours", encoded(plain, icc_profile=linear_grey()), plain)
    yield _good("icc_text", encoded(plain, icc_profile=b"no profile at all"), plain)
    yield _good("icc_cut", encoded(plain, icc_profile=adobe_like()[:200]), plain)
    cmyk = encoded(plain.convert("CMYK"), "JPEG", quality=95)
    yield _good("cmyk_without_icc", cmyk)
    cmyk = encoded(plain.convert("CMYK"), "JPEG", quality=95, icc_profile=inks())
    printer = ImageCms.ImageCmsProfile(io.BytesIO(inks()))
    decoded = Image.open(io.BytesIO(cmyk))
    yield _good("cmyk_with_icc", cmyk, ImageCms.profileToProfile(decoded, printer, srgb, outputMode="RGB"))
    yield _good("cmyk_tiff", encoded(plain.convert("CMYK"), "TIFF"))


def _transparent() -> Iterator[Case]:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(PHOTO_SIZE))
    for mode in ("RGBA", "LA"):
        image = rgba.convert(mode)
        yield _good(f"alpha_{mode.lower()}", encoded(image), _over_white(image))
    adobe = ImageCms.ImageCmsProfile(io.BytesIO(adobe_like()))
    srgb = ImageCms.createProfile("sRGB")
    colours = ImageCms.profileToProfile(rgba.convert("RGB"), adobe, srgb, outputMode="RGB")
    colours.putalpha(rgba.getchannel("A"))
    yield _good("alpha_and_icc", encoded(rgba, icc_profile=adobe_like()), _over_white(colours))
    palette = picture().quantize(16)
    yield _good("palette", encoded(palette), palette.convert("RGB"))
    for name, value in {"entry": 3, "table": bytes(range(0, 256, 16))}.items():
        data = encoded(palette, transparency=value)
        yield _good(f"palette_with_transparent_{name}", data, _over_white(Image.open(io.BytesIO(data))))
    data = encoded(picture(), transparency=(250, 20, 30))
    yield _good("transparent_colour", data, _over_white(Image.open(io.BytesIO(data))))


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _greys() -> Iterator[Case]:
    bits = Image.fromarray(np.indices((9, 13)).sum(0) % 2 == 0)
    yield _good("one_bit", encoded(bits), bits.convert("RGB"))
    yield _good("one_bit_fax", encoded(bits, "TIFF", compression="group4"), bits.convert("RGB"))
    full = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]])
    levels = [[0, 0, 1, 1, 128, 254, 255, 255]]
    for image_format in ("PNG", "TIFF", "PPM"):
        data = encoded(Image.fromarray(full.astype(np.uint16)), image_format)
        yield _good(f"16_bits_{image_format.lower()}", data, _three(levels))
    yield _good("32_bits_of_16", encoded(Image.fromarray(full.astype(np.int32)), "TIFF"), _three(levels))
    far = np.array([[-1000, 0, 1000, 9200]], np.int32)
    yield _good("32_bits_of_their_own", encoded(Image.fromarray(far), "TIFF"), _three([[0, 25, 50, 255]]))
    light = np.array([[0, 0.25, 0.5, 1]], np.float32)
    yield _good("float", encoded(Image.fromarray(light), "TIFF"), _three([[0, 64, 128, 255]]))
    yield _good("float_of_255", encoded(Image.fromarray(light * 255), "TIFF"), _three([[0, 64, 128, 255]]))
    odd = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    yield _good("float_not_finite", encoded(Image.fromarray(odd), "TIFF"), _three([[0, 255, 0, 128]]))
    lab = picture().convert("RGB")
    lab = ImageCms.profileToProfile(
        lab, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    back = ImageCms.profileToProfile(
        lab, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    yield _good("lab_tiff", encoded(lab, "TIFF"), back)


def _three(levels: list[list[int]]) -> Pixels:
    return np.array(levels, np.uint8)[..., None].repeat(3, axis=2)


def _formats() -> Iterator[Case]:
    plain, second = picture(), picture().transpose(Image.Transpose.ROTATE_180)
    for image_format in ("PNG", "BMP", "TIFF", "PPM"):
        yield _good(f"plain_{image_format.lower()}", encoded(plain, image_format), plain)
    yield _good("plain_webp", encoded(plain, "WEBP", lossless=True), plain)
    yield _good("plain_jpeg", encoded(plain, "JPEG"))
    yield _good("plain_avif", encoded(plain, "AVIF"))
    yield _good("plain_jpeg2000", encoded(plain, "JPEG2000"), plain)
    yield _good("progressive_jpeg", encoded(plain, "JPEG", progressive=True))
    yield _good("interlaced_png", _interlaced_png(), plain)
    yield _good("junk_after_jpeg", encoded(plain, "JPEG") + b"<html>" * 99)
    yield _good("junk_after_png", encoded(plain) + bytes(999), plain)
    for image_format in ("PNG", "WEBP", "TIFF"):
        data = encoded(plain, image_format, save_all=True, append_images=[second], lossless=True)
        yield _good(f"first_of_two_{image_format.lower()}", data, plain)
    palettes = [image.quantize(64) for image in (plain, second)]
    data = encoded(palettes[0], "GIF", save_all=True, append_images=palettes[1:])
    yield _good("first_of_two_gif", data, palettes[0].convert("RGB"))
    yield _good("1_by_1", encoded(Image.new("RGB", (1, 1), (1, 2, 3))), Image.new("RGB", (1, 1), (1, 2, 3)))
    for name, size in {"100_to_1": (600, 6), "1_to_100": (6, 600)}.items():
        yield _good(name, encoded(plain.resize(size)), plain.resize(size))
    data = encoded(plain, "TIFF", compression="jpeg", quality=90)
    yield _good("jpeg_in_tiff", data)


def _interlaced_png() -> bytes:
    """`picture` in the seven passes of Adam7 (PNG specification, section 8.2); Pillow only reads it."""
    levels = np.asarray(picture())
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    parts = (levels[top::down, left::right] for top, left, down, right in passes)
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", *PHOTO_SIZE, 8, 2, 0, 0, 1)
    body = png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body
