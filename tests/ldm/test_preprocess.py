import io
import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from ldm.aspect_buckets import AspectBuckets
from ldm.errors import BadSampleError
from ldm.images import encode_png
from ldm.preprocess import Preprocess
from tests.ldm.bad_images import black_png, encoded

LANCZOS = Image.Resampling.LANCZOS
ORIENTATION = 0x0112


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """Detail as a photograph has it: noise at three scales."""
    rng = np.random.default_rng(1)
    image = np.zeros((height, width, 3))
    for divisor in (8, 32, 128):
        noise = rng.integers(0, 256, (height // divisor + 2, width // divisor + 2, 3), dtype=np.uint8)
        image += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(image.astype(np.uint8))


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return 20 * math.log10(255 / max(1e-9, np.sqrt(np.mean((a.astype(float) - b) ** 2))))


def reason(config: Preprocess, data: bytes) -> str:
    with pytest.raises(BadSampleError) as caught:
        config.views(data, "k")
    return caught.value.reason


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (33, 32), (32, 33), (31, 300), (500, 333)])
def test_every_size_becomes_the_square(size: tuple[int, int]) -> None:
    (found,) = Preprocess(sizes_px=(32,)).views(encoded(Image.new("RGB", size, (10, 200, 30))), "k")
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(found, np.broadcast_to(np.uint8([10, 200, 30]), found.shape))


def test_a_centre_crop_is_one_call_of_pillow() -> None:
    image = Image.fromarray(pixels(91, 150))
    (found,) = Preprocess(sizes_px=(32,)).views(encoded(image), "k")
    expected = image.resize((32, 32), LANCZOS, box=(29, 0, 120, 91), reducing_gap=3.0)
    assert np.array_equal(found, np.asarray(expected))


def test_every_size_is_what_it_would_be_alone() -> None:
    data = encode_png(pixels(70, 90))
    for options in ({}, {"crop": "random"}):
        together = Preprocess(sizes_px=(32, 8, 64), **options).views(data, "k")
        for size, found in zip((32, 8, 64), together, strict=True):
            assert np.array_equal(found, Preprocess(sizes_px=(size,), **options).views(data, "k")[0])


def test_pixels_of_the_wanted_size_are_cropped_and_not_filtered() -> None:
    image = pixels(16, 21)
    assert np.array_equal(Preprocess(sizes_px=(16,)).views(encode_png(image), "k")[0], image[:, 2:18])


def test_a_reduction_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    (found,) = Preprocess(sizes_px=(16,)).views(encode_png(stripes), "k")
    assert abs(found[2:-2, 2:-2].astype(int) - 127.5).max() < 8


def test_a_random_crop_depends_on_seed_and_key_alone() -> None:
    image = pixels(16, 40)
    starts = []
    for key in map(str, range(300)):
        (found,) = Preprocess(sizes_px=(16,), crop="random").views(encode_png(image), key)
        (start,) = (s for s in range(25) if np.array_equal(found, image[:, s : s + 16]))
        starts.append(start)
    # All 25 places are taken, each as often as chance has it: 12 times, standard deviation 3.4.
    counts = np.bincount(starts, minlength=25)
    assert counts.min() >= 1 and counts.max() <= 12 + 5 * 3.4
    again = Preprocess(sizes_px=(16,), crop="random").views(encode_png(image), "7")[0]
    assert np.array_equal(again, image[:, starts[7] : starts[7] + 16])
    others = [
        Preprocess(sizes_px=(16,), crop="random", seed=s).views(encode_png(image), "7")[0] for s in range(5)
    ]
    assert len({other.tobytes() for other in others}) > 1


def test_no_crop_keeps_the_aspect_and_cuts_to_the_multiple() -> None:
    image = pixels(16, 45)
    found = Preprocess(sizes_px=(16, 32), crop="none", multiple_px=8).views(encode_png(image), "k")
    assert np.array_equal(found[0], image[:, 2:42])
    assert found[1].shape == (32, 80, 3)
    (upright,) = Preprocess(sizes_px=(16,), crop="none", multiple_px=8).views(
        encode_png(image.transpose(1, 0, 2)), "k"
    )
    assert np.array_equal(upright, image[:, 2:42].transpose(1, 0, 2))


def test_buckets_of_256_in_steps_of_64() -> None:
    assert AspectBuckets().shapes(256) == ((192, 320), (256, 256), (320, 192))
    assert AspectBuckets(max_aspect=4).shapes(256)[0] == (128, 512)


@pytest.mark.parametrize(
    ("size", "step", "aspect"), [(256, 32, 2.0), (512, 64, 3.0), (100, 7, 1.5), (64, 8, 8.0)]
)
def test_buckets_are_full_and_lie_mirrored(size: int, step: int, aspect: float) -> None:
    shapes = AspectBuckets(step_px=step, max_aspect=aspect).shapes(size)
    assert shapes and {shape[::-1] for shape in shapes} == set(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size**2 < min((height + step) * width, height * (width + step))
        assert max(height, width) <= aspect * min(height, width)
    assert all(low[1] > high[1] for low, high in pairwise(shapes))


def test_an_image_goes_to_the_nearest_bucket_and_fills_it() -> None:
    config = Preprocess(sizes_px=(64, 128), buckets=AspectBuckets(step_px=16, max_aspect=3))
    buckets = AspectBuckets(step_px=16, max_aspect=3).shapes(64)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 300, (60, 2)).tolist():
        low, high = config.views(encoded(Image.new("RGB", (width, height), (9, 99, 199))), "k")
        distances = [abs(math.log(w / h) - math.log(width / height)) for h, w in buckets]
        chosen = buckets.index((low.shape[0], low.shape[1]))
        assert distances[chosen] == pytest.approx(min(distances))
        assert high.shape == (2 * low.shape[0], 2 * low.shape[1], 3)
        assert (high == np.uint8([9, 99, 199])).all()


def test_a_tie_between_buckets_goes_to_the_wider() -> None:
    # 100² in steps of 60: 60×120 and 120×60 are equally far from a square, which does not fit.
    buckets = AspectBuckets(step_px=60)
    assert buckets.shapes(100) == ((60, 120), (120, 60))
    assert buckets.nearest(7, 7, 100) == (60, 120)


def test_a_bucket_crop_is_one_call_of_pillow() -> None:
    image = Image.fromarray(pixels(100, 200))
    (found,) = Preprocess(sizes_px=(64,), buckets=AspectBuckets(step_px=16)).views(encoded(image), "k")
    # 48×80: of 200 columns, 100 · 80/48 = 166.67 are kept, from column 16 on.
    expected = image.resize((80, 48), LANCZOS, box=(16, 0, 16 + 100 * 80 / 48, 100), reducing_gap=3.0)
    assert np.array_equal(found, np.asarray(expected))


def test_shapes_are_those_that_views_give() -> None:
    assert Preprocess(sizes_px=(64, 32)).shapes() == [(32, 32), (64, 64)]
    assert Preprocess(sizes_px=(64,), crop="none", multiple_px=16).shapes() == [(16, 16)]
    config = Preprocess(sizes_px=(64, 128), buckets=AspectBuckets(step_px=16))
    low = [(48, 80), (64, 64), (80, 48)]
    assert config.shapes() == sorted(low + [(2 * height, 2 * width) for height, width in low])
    seen = set()
    for width in range(20, 100, 4):
        seen |= {view.shape[:2] for view in config.views(encoded(Image.new("RGB", (width, 45))), "k")}
    assert seen == set(config.shapes())


@pytest.mark.parametrize("size", [(1100, 820), (1003, 777)])
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_the_draft_of_a_jpeg_changes_little(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(smooth(size[1], size[0]), "JPEG", quality=90, exif=exif)
    for options in ({}, {"crop": "random"}, {"buckets": AspectBuckets(step_px=16)}):
        (fast,) = Preprocess(sizes_px=(64,), **options).views(data, "k")
        (full,) = Preprocess(sizes_px=(64,), jpeg_draft=False, **options).views(data, "k")
        assert psnr_db(fast, full) > 45


def test_the_draft_is_exactly_that_of_pillow() -> None:
    data = encoded(smooth(400, 600), "JPEG", quality=90)
    image = Image.open(io.BytesIO(data))
    image.draft(None, (150, 100))
    assert image.size == (150, 100)
    expected = image.resize((32, 32), LANCZOS, box=(25, 0, 125, 100), reducing_gap=3.0)
    assert np.array_equal(Preprocess(sizes_px=(32,)).views(data, "k")[0], np.asarray(expected))
    # At 34 px a quarter would be less than 3 times as dense.
    image = Image.open(io.BytesIO(data))
    image.draft(None, (300, 200))
    expected = image.resize((34, 34), LANCZOS, box=(50, 0, 250, 200), reducing_gap=3.0)
    assert np.array_equal(Preprocess(sizes_px=(34,)).views(data, "k")[0], np.asarray(expected))


def test_filters_have_reasons_of_their_own() -> None:
    data = encode_png(pixels(20, 61))
    assert reason(Preprocess(min_side_px=21), data) == "too_small"
    assert reason(Preprocess(max_aspect=3), data) == "extreme_aspect"
    assert reason(Preprocess(max_pixels=1219), data) == "too_many_pixels"
    kept = Preprocess(sizes_px=(64,), min_side_px=20, max_aspect=3.05, max_pixels=1220)
    assert kept.views(data, "k")[0].shape == (64, 64, 3)


def test_a_thread_of_an_image_does_not_fill_the_memory() -> None:
    # Its whole enlargement to 256 × 2,560,000,000 pixels would take two terabytes.
    data = black_png(10_000_000, 1)
    assert Preprocess().views(data, "k")[0].shape == (256, 256, 3)
    assert Preprocess(buckets=AspectBuckets()).views(data, "k")[0].shape == (192, 320, 3)
    assert reason(Preprocess(crop="none"), data) == "extreme_aspect"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size_px": 3}, "Extra inputs"),
        ({"sizes_px": ()}, "at least 1 item"),
        ({"sizes_px": (0,)}, "greater than 0"),
        ({"sizes_px": (8, 8)}, "names a size twice"),
        ({"crop": "left"}, "'center', 'random' or 'none'"),
        ({"crop": "none", "buckets": {}}, "buckets need a crop"),
        ({"crop": "none", "sizes_px": (100,)}, "no multiple of multiple_px"),
        ({"crop": "none", "sizes_px": (128, 192)}, "multiple of the smallest, 128"),
        ({"buckets": {}, "sizes_px": (256, 384)}, "multiple of the smallest, 256"),
        ({"buckets": {"step_px": 300}}, "no bucket fits size 256"),
        ({"max_aspect": 0.5}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_config_is_refused_with_the_reason(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Preprocess.model_validate(options)


def test_sizes_and_buckets_are_typed_on_the_command_line() -> None:
    from jobs.config import load
    from jobs.encode import EncodeJob

    line = "a b --preprocess.sizes-px 256,512 --preprocess.crop random --preprocess.buckets.step-px 32"
    job, _ = load(EncodeJob, "encode", line.split())
    expected = Preprocess(sizes_px=(256, 512), crop="random", buckets=AspectBuckets(step_px=32))
    assert job.preprocess == expected
    assert Preprocess.model_validate_json(expected.model_dump_json()) == expected
