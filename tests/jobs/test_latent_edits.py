"""``ldm interpolate``, ``edit``, ``inpaint`` and ``direction`` with real files, and what they refuse."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.cli import main
from jobs.direction import DirectionJob
from jobs.edit import EditJob
from jobs.inpaint import InpaintJob
from jobs.interpolate import InterpolateJob
from ldm.autoencoder import load
from ldm.checkpoint import read_info, read_scheduler_config
from ldm.conditioning import ClassConditioner
from ldm.direction_file import read_direction
from ldm.image_tensors import from_model, to_model
from ldm.images import encode_png
from ldm.sampling import Trajectory, sample
from ldm.unet import load as load_unet

Photo = Callable[[int], bytes]


def pixels(path: Path | bytes) -> np.ndarray:
    content = path if isinstance(path, bytes) else path.read_bytes()
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture
def photos(photo: Photo, tmp_path: Path) -> list[str]:
    """Two images of 40×32 pixels."""
    paths = [tmp_path / f"photo{seed}.png" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        path.write_bytes(photo(seed))
    return [str(path) for path in paths]


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White from (9, 5) on to (20, 17), of 40×32."""
    white = np.zeros((32, 40, 3), np.uint8)
    white[5:17, 9:20] = 255
    (tmp_path / "mask.png").write_bytes(encode_png(white))
    return tmp_path / "mask.png"


def test_a_path_of_images_ends_in_their_reconstructions(
    vae_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "path"
    job = InterpolateJob(ends=photos, out=out, vae=str(vae_folder), frames=3, perceptual="random")
    result = job.run()
    autoencoder = load(vae_folder)
    latents = torch.cat([autoencoder.encode(to_model(pixels(Path(p))[None])).mode() for p in photos])
    middle = latents.mean(0, keepdim=True)
    expected = from_model(autoencoder.decode(torch.cat([latents[:1], middle, latents[1:]])))
    for index in range(3):
        difference = pixels(out / f"frame-00{index}.png").astype(int) - expected[index]
        assert np.abs(difference).max() <= 1  # whitened and back: the last bit of a float
    assert pixels(out / "sheet.png").shape == (32, 120, 3)
    assert isinstance(result["smoothness"], dict) and result["smoothness"]["perceptual"] == "random-features"


def test_a_grid_of_dataset_rows_arrays_and_images(
    latent_folder: Path, photos: list[str], photo: Photo, tmp_path: Path
) -> None:
    (tmp_path / "square.png").write_bytes(encode_png(pixels(photo(3))[:, :32]))
    np.save(tmp_path / "z.npy", np.zeros((3, 8, 8), np.float16))
    ends = [
        f"{latent_folder}#k1",
        str(tmp_path / "z.npy"),
        str(tmp_path / "square.png"),
        f"{latent_folder}#k2",
    ]
    InterpolateJob(ends=ends, out=tmp_path / "grid", frames=3, method="slerp").run()
    assert pixels(tmp_path / "grid/sheet.png").shape == (96, 96, 3)
    assert len(list((tmp_path / "grid").glob("frame-*.png"))) == 9


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_a_path_of_seeds_ends_in_what_the_seeds_are_sampled_to(
    checkpoint_folders: dict[str, Path], vae_folder: Path, tmp_path: Path, kind: str
) -> None:
    folder = checkpoint_folders[kind]
    InterpolateJob.model_validate(
        {
            "ends": ["seed:3", "seed:9"],
            "checkpoint": folder,
            "out": tmp_path / "path",
            "frames": 3,
            "denoise": {"steps": 2, "class_name": "dog", "guidance": 2},
        }
    ).run()
    classes = ClassConditioner(["cat", "dog"])
    plain = [
        Trajectory(
            shape=(3, 8, 8),
            scheduler="flow_euler" if kind == "flow" else "ddim",
            scheduler_config=read_scheduler_config(folder),
            num_inference_steps=2,
            guidance=2.0,
            seed=seed,
            condition=classes.encode(["dog"]),
            null=classes.null,
        )
        for seed in (3, 9)
    ]
    x = sample(load_unet(folder).eval(), plain, batch_size=1)
    expected = from_model(load(vae_folder).decode(read_info(folder).whitening.denormalise(x)))
    frames = [pixels(tmp_path / f"path/frame-00{index}.png").astype(int) for index in range(3)]
    assert np.abs(frames[0] - expected[0]).max() <= 1
    assert np.abs(frames[2] - expected[1]).max() <= 1
    assert np.abs(frames[1] - frames[0]).max() > 5


def test_edit_at_strength_0_is_the_images_own_encoding(
    checkpoint_folders: dict[str, Path], vae_folder: Path, photos: list[str], tmp_path: Path
) -> None:
    result = EditJob.model_validate(
        {
            "input": photos[0],
            "checkpoint": checkpoint_folders["v_prediction"],
            "out": tmp_path / "edit",
            "strength": (0.0, 1.0),
            "denoise": {"steps": 2},
            "measure": {"perceptual": "random", "extractor": "random"},
        }
    ).run()
    # 40 pixels are 10 latents, and the U-Net takes multiples of 4: padded with the last column.
    image = pixels(Path(photos[0]))
    padded = np.concatenate([image, np.repeat(image[:, -1:], 8, axis=1)], axis=1)
    autoencoder = load(vae_folder)
    z = autoencoder.encode(to_model(padded[None])).mode()
    np.testing.assert_array_equal(np.load(tmp_path / "edit/strength+0.npy"), z[0].numpy())
    own, anew = (pixels(tmp_path / f"edit/strength+{s}.png") for s in (0, 1))
    np.testing.assert_array_equal(own, from_model(autoencoder.decode(z))[0, :, :40])
    assert own.shape == anew.shape == (32, 40, 3)
    assert pixels(tmp_path / "edit/sheet.png").shape == (32, 120, 3)
    edits = result["edits"]
    assert isinstance(edits, list) and [edit["strength"] for edit in edits] == [0.0, 1.0]
    mse = np.square(own.astype(float) - image).mean() / 255**2
    assert edits[0]["psnr_db"] == pytest.approx(-10 * np.log10(mse), rel=1e-4)


@pytest.mark.parametrize("paste", [True, False])
def test_inpainting_keeps_what_the_mask_does_not_cover(
    checkpoint_folders: dict[str, Path],
    vae_folder: Path,
    photos: list[str],
    mask: Path,
    tmp_path: Path,
    paste: bool,
) -> None:
    result = InpaintJob.model_validate(
        {
            "image": photos[0],
            "mask": mask,
            "checkpoint": checkpoint_folders["flow"],
            "out": tmp_path / "paint",
            "images": 2,
            "paste": paste,
            "denoise": {"steps": 2, "seed": 6},
        }
    ).run()
    image, white = pixels(Path(photos[0])), pixels(mask)[..., 0] == 255
    painted = [pixels(tmp_path / f"paint/seed{seed}.png") for seed in (6, 7)]
    for one in painted:
        assert np.array_equal(one[~white], image[~white]) == paste
        assert not np.array_equal(one[white], image[white])
    assert not np.array_equal(painted[0][white], painted[1][white])
    z = (
        load(vae_folder)
        .encode(to_model(np.pad(image, [(0, 0), (0, 8), (0, 0)], mode="edge")[None]))
        .mode()[0]
    )
    found = np.load(tmp_path / "paint/seed6.npy")
    # Rows 5 to 16 and columns 9 to 19 lie in latents 1 to 4 and 2 to 4.
    covered = np.zeros((8, 12), bool)
    covered[1:5, 2:5] = True
    np.testing.assert_array_equal(found[:, ~covered], z.numpy()[:, ~covered])
    assert (found != z.numpy())[:, covered].all()
    edits = result["edits"]
    assert isinstance(edits, list) and (edits[0]["psnr_outside_db"] == float("inf")) == paste


@pytest.mark.parametrize("method", ["mean", "logistic"])
def test_a_direction_is_made_and_moved_along(latent_folder: Path, tmp_path: Path, method: str) -> None:
    file = tmp_path / "dog.safetensors"
    result = DirectionJob.model_validate(
        {"dataset": str(latent_folder), "attribute": "dog", "out": file, "method": method}
    ).run()
    assert (result["rows_with"], result["rows_without"]) == (9, 10)
    auc = result["held_out_auc"]
    assert isinstance(auc, float) and 0 <= auc <= 1
    edited = EditJob(
        input=f"{latent_folder}#k3", direction=file, out=tmp_path / "edit", strength=(0.0, -1.5)
    ).run()
    step = read_direction(file).step_Chw.numpy()
    own, moved = (np.load(tmp_path / f"edit/strength{s}.npy") for s in ("+0", "-1.5"))
    np.testing.assert_allclose(moved - own, -1.5 * step, atol=1e-5)
    edits = edited["edits"]
    assert isinstance(edits, list)
    assert ("probability_after" in edits[0]) == (method == "logistic")
    z = torch.from_numpy(own)[None]
    assert edits[1]["position_before"] == pytest.approx(float(read_direction(file).position(z)), abs=1e-6)


def test_files_that_do_not_fit_each_other_are_told(
    checkpoint_folders: dict[str, Path],
    vae_folder: Path,
    other_vae_folder: Path,
    latent_folder: Path,
    photos: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, vae = f"--checkpoint={checkpoint_folders['flow']}", f"--vae={vae_folder}"
    small, black = str(tmp_path / "small.png"), str(tmp_path / "black.png")
    Path(small).write_bytes(encode_png(np.full((8, 8, 3), 255, np.uint8)))
    Path(black).write_bytes(encode_png(np.zeros((32, 40, 3), np.uint8)))
    np.save(tmp_path / "z.npy", np.zeros((3, 8, 8), np.float32))
    z, file = str(tmp_path / "z.npy"), str(tmp_path / "dog.safetensors")
    assert main(["direction", str(latent_folder), "dog", file]) == 0
    cases = {
        ("interpolate", photos[0], small, vae): "different sizes: 8×8, 40×32",
        ("interpolate", photos[0], z, vae): "different sizes: 32×32, 40×32",
        ("edit", photos[0], vae, f"--direction={file}"): "has the shape (3, 8, 8), the latent (3, 8, 10)",
        ("edit", z, f"--vae={other_vae_folder}", f"--direction={file}"): "of another VAE",
        ("inpaint", photos[0], small, checkpoint): "is 8×8, the image 40×32",
        ("inpaint", photos[0], black, checkpoint): "black all over",
    }
    capsys.readouterr()
    for line, said in cases.items():
        assert main([*line, f"--out={tmp_path / 'out'}"]) == 2, line
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_the_result_is_one_line_of_json(
    vae_folder: Path, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["interpolate", *photos, "--vae", str(vae_folder), "--frames", "2", "--out", str(tmp_path / "o")]
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["smoothness"] is None
