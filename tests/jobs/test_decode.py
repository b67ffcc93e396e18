"""``ldm decode``: from an array, from a row of a dataset, and what is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.decode import DecodeJob
from jobs.decoded_image import _whitened_std
from ldm.autoencoder import load
from ldm.errors import UserError
from ldm.image_tensors import from_model
from pipelines.latent_table import read_latents

LATENT = np.random.default_rng(0).normal(size=(3, 4, 6))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def decoded(vae_folder: Path, latent: np.ndarray) -> np.ndarray:
    return from_model(load(vae_folder).decode(torch.from_numpy(latent.astype(np.float32))[None]))[0]


def assert_same_but_for_rounding(got: np.ndarray, wanted: np.ndarray) -> None:
    """By default a latent is decoded in tiles, which sum in another order than one call of the VAE."""
    np.testing.assert_allclose(got.astype(int), wanted.astype(int), atol=1)
    assert (got == wanted).mean() > 0.99


def test_a_large_image_is_cropped_and_written_as_tiff(vae_folder: Path, tmp_path: Path) -> None:
    latent = np.random.default_rng(1).normal(size=(3, 20, 30)).astype(np.float32)
    np.save(tmp_path / "latent.npy", latent)
    DecodeJob.model_validate(
        {
            "latent": str(tmp_path / "latent.npy"),
            "out": tmp_path / "image.tif",
            "vae": str(vae_folder),
            "tiling": {"mode": "exact", "tile": 8, "spill": tmp_path / "spill"},
            "crop_px": (77, 101),
        }
    ).run()
    wanted = decoded(vae_folder, latent)[:77, :101]
    assert_same_but_for_rounding(pixels(tmp_path / "image.tif"), wanted)


@pytest.mark.parametrize(("factor", "is_doubted"), [(1.0, False), (0.1, True), (10.0, True)])
def test_a_latent_of_another_scale_gets_a_note(
    vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, is_doubted: bool
) -> None:
    std = load(vae_folder).whitening.scale_C[0]
    np.save(tmp_path / "latent.npy", LATENT.astype(np.float32) * std * factor)
    DecodeJob(latent=str(tmp_path / "latent.npy"), out=tmp_path / "a.png", vae=str(vae_folder)).run()
    assert ("this latent varies" in capsys.readouterr().err) == is_doubted


def test_the_deviation_is_that_of_the_whitened_latent() -> None:
    autoencoder = load("f8")
    latent_Chw = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(0))
    latent_Chw *= torch.arange(1, 5)[:, None, None]
    wanted = autoencoder.whitening.normalise(latent_Chw[None]).std(correction=0)
    assert _whitened_std(autoencoder, latent_Chw) == pytest.approx(float(wanted), rel=1e-6)


def test_a_crop_larger_than_the_image_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latent.npy", LATENT)
    said = "17×24 px of an image of 16×24 px"
    refused(tmp_path, said, tmp_path / "latent.npy", vae=str(vae_folder), crop_px=(17, 24))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_array(vae_folder: Path, tmp_path: Path, dtype: str) -> None:
    latent = LATENT.astype(dtype)
    np.save(tmp_path / "latent.npy", latent)
    out = tmp_path / "new/image.PNG"
    result = DecodeJob(latent=str(tmp_path / "latent.npy"), out=out, vae=str(vae_folder)).run()
    assert {**result, "seconds": 0} == {"out": str(out), "width": 24, "height": 16, "seconds": 0}
    assert_same_but_for_rounding(pixels(out), decoded(vae_folder, latent))


def test_row_of_a_dataset_is_decoded_with_the_datasets_own_vae(
    latent_folder: Path, vae_folder: Path, tmp_path: Path
) -> None:
    DecodeJob(latent=f"{latent_folder}#k11", out=tmp_path / "image.png").run()
    rows = read_latents(str(latent_folder / "data/32x32/unit-000001.parquet"))
    expected = decoded(vae_folder, rows.moments.mean_NChw[rows.keys.index("k11")])
    assert_same_but_for_rounding(pixels(tmp_path / "image.png"), expected)


def refused(tmp_path: Path, said: str, latent: object, **options: object) -> None:
    """``DecodeJob`` says so and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        DecodeJob.model_validate({"out": tmp_path / "new/image.png", "latent": str(latent), **options}).run()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("latent", "said"),
    [
        (LATENT[0], r"holds float64 \(4, 6\); allowed: floats of shape \(C, h, w\)"),
        (LATENT[None], r"holds float64 \(1, 3, 4, 6\)"),
        (LATENT.astype(np.int64), r"holds int64 \(3, 4, 6\)"),
        (LATENT[:2], r"a latent of shape \(1, 2, 4, 6\) is not one of VAE"),
    ],
)
def test_array_of_another_kind(vae_folder: Path, tmp_path: Path, latent: np.ndarray, said: str) -> None:
    np.save(tmp_path / "latent.npy", latent)
    refused(tmp_path, said, tmp_path / "latent.npy", vae=str(vae_folder))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(vae_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latent.npy", np.array([Bomb(tmp_path / "exploded")], dtype=object))
    refused(tmp_path, "cannot read latent.*without pickle", tmp_path / "latent.npy", vae=str(vae_folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array at all"])
def test_bytes_that_are_no_array(vae_folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latent.npy").write_bytes(content)
    refused(tmp_path, "cannot read latent", tmp_path / "latent.npy", vae=str(vae_folder))


def test_an_archive_of_arrays(vae_folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "latent.npz", LATENT)
    refused(tmp_path, "is an archive of arrays", tmp_path / "latent.npz", vae=str(vae_folder))


def test_what_is_not_there(latent_folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, "cannot read latent .*No such file", tmp_path / "missing.npy")
    refused(tmp_path, "no row 'k99' in latent dataset", f"{latent_folder}#k99")
    refused(tmp_path, "no such latent dataset", f"{tmp_path / 'missing'}#k0")


def test_another_vae_than_the_datasets(latent_folder: Path, other_vae_folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, "latents of another VAE", f"{latent_folder}#k0", vae=str(other_vae_folder))


def test_output_has_a_known_format(latent_folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, "has no known format; allowed", f"{latent_folder}#k0", out=tmp_path / "image.jpg")
