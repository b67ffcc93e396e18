"""``ldm upscale``: sizes, equal bits on any number of actors and after interruptions, what is refused."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.upscale import UpscaleJob
from ldm import checkpoint, unet
from ldm.autoencoder import load
from ldm.cascade import Sampling, Upsampler, Upsampling, WindowDenoiser
from ldm.errors import UserError
from ldm.image_tensors import from_model
from ldm.images import encode_png
from ldm.tiling.config import Tiling
from ldm.tiling.decode import plan
from ldm.tiling.encode import encode
from pipelines.window_pool import WindowPool

OPTIONS = {"steps": 4, "noise_level": 10, "snapshot_every": 1, "window_batch": 2}


@pytest.fixture(scope="module")
def stages(save_upsampler: Callable[..., Path]) -> tuple[Path, Path]:
    return save_upsampler(1), save_upsampler(2, "flow")


def job(source: object, out: Path, stages: tuple[Path, ...], **options: object) -> UpscaleJob:
    return UpscaleJob.model_validate(
        {"input": str(source), "out": out, "stages": stages, **OPTIONS, **options}
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def by_hand(low: np.ndarray, folders: tuple[Path, ...], **options: int) -> torch.Tensor:
    """Both stages in this process."""
    latent = torch.from_numpy(low)
    for stage, folder in enumerate(folders, start=1):
        upsampler = Upsampler.read(folder)
        sampling = Sampling(
            seed=0, num_inference_steps=4, scheduler="ddim" if stage == 1 else "flow_euler", noise_level=10,
            window_overlap=0.25, window_batch=2,
        )  # fmt: skip
        upsampling = Upsampling(latent, upsampler, sampling, stage)
        denoiser = WindowDenoiser(unet.load(folder), upsampler.info)
        while not upsampling.trajectory.done:
            upsampling.step(lambda batches, run=denoiser: map(run, batches))  # type: ignore[misc]
        latent = upsampling.latent_CHW
    return latent


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21×14 px: 6×4 latents, with a rest."""
    path = tmp_path_factory.mktemp("picture") / "a#1.png"
    path.write_bytes(encode_png(np.random.default_rng(0).integers(0, 256, (14, 21, 3), np.uint8)))
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_through_two_stages(
    picture: Path, stages: tuple[Path, Path], vae_folder: Path, tmp_path: Path
) -> None:
    result = job(picture, tmp_path / "big.png", stages, pool=WindowPool(size=2)).run()
    assert result == {
        "out": str(tmp_path / "big.png"), "work": str(tmp_path / "big.stages"), "width": 84, "height": 56,
    }  # fmt: skip
    autoencoder = load(vae_folder)
    padded = np.pad(pixels(picture), ((0, 2), (0, 3), (0, 0)), mode="edge")
    low = encode(autoencoder, padded, Tiling(mode="exact")).mode()[0].numpy()
    latent = by_hand(low, stages)
    np.testing.assert_array_equal(np.load(tmp_path / "big.stages/stage2.npy"), latent)
    expected = from_model(autoencoder.decode(latent[None]))[0][:56, :84]
    # It is decoded in tiles, which sum in another order than one call of the VAE.
    np.testing.assert_allclose(pixels(tmp_path / "big.png").astype(int), expected.astype(int), atol=1)
    names = {path.name for path in (tmp_path / "big.stages").iterdir()}
    assert names == {"run.json", *(f"stage{n}.{kind}" for n in (1, 2) for kind in ("npy", "png"))}
    assert pixels(tmp_path / "big.stages/stage2.png").shape == (16, 24, 3)


def test_another_run_in_the_folder(latent_folder: Path, stages: tuple[Path, Path], tmp_path: Path) -> None:
    """Found before Ray is asked for."""
    from pipelines.latent_source import read_latent
    from pipelines.upscale import check, open_run

    low = read_latent(f"{latent_folder}#k3").latent_Chw
    config = job("", tmp_path / "out.npy", stages)
    upsamplers = check(low, stages, config, load(checkpoint.read_info(stages[0]).vae))
    open_run(tmp_path / "out.stages", low, upsamplers, config, threads=1)
    open_run(tmp_path / "out.stages", low, upsamplers, config, threads=1)
    said = r"holds a run of another kind \(seed: 1, was 0; window_batch: 3, was 2\); give the settings"
    with pytest.raises(UserError, match=said):
        job(f"{latent_folder}#k3", tmp_path / "out.npy", stages, seed=1, window_batch=3).run()


def refused(tmp_path: Path, said: str, source: object, stages: tuple[Path, ...], **options: object) -> None:
    """In one line, before anything is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said) as caught:
        job(source, options.pop("out", tmp_path / "new/out.png"), stages, **options).run()  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_room_to_decode_is_found_first(
    latent_folder: Path, stages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    autoencoder = load(checkpoint.read_info(stages[0]).vae)
    # Of what two stages make of 8×8 latents.
    free_bytes = plan(autoencoder, (3, 32, 32), Tiling(mode="exact")).needed_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_bytes - 1))
    said = "feature maps need .*, and memory has .*; give a folder with --tiling.spill, or choose mode fast"
    refused(tmp_path, said, f"{latent_folder}#k3", stages)


def test_what_is_refused(
    picture: Path,
    stages: tuple[Path, Path],
    latent_folder: Path,
    checkpoint_folders: dict[str, Path],
    other_vae_folder: Path,
    save_upsampler: Callable[..., Path],
    tmp_path: Path,
) -> None:
    row = f"{latent_folder}#k3"
    refused(tmp_path, "has no known format; allowed", row, stages, out=tmp_path / "out.jpg")
    refused(tmp_path, "is no checkpoint", row, (tmp_path,))
    plain = checkpoint_folders["v_prediction"]
    refused(tmp_path, f"{plain} is no upsampler; give a checkpoint that was trained", row, (stages[0], plain))
    foreign = save_upsampler(3, vae=other_vae_folder)
    refused(tmp_path, f"checkpoint {foreign} has latents of another VAE", row, (stages[0], foreign))
    refused(tmp_path, "k3 has latents of another VAE", row, (foreign,))
    refused(tmp_path, "noise level 101 for upsampler .*; allowed: 0 to 100", row, stages, noise_level=101)
    refused(tmp_path, "unknown scheduler 'pndm'; allowed: ddim", row, stages, scheduler="pndm")
    refused(tmp_path, "scheduler 'ddim' cannot sample a flow", row, stages, scheduler="ddim")
    refused(tmp_path, "1001 inference steps; allowed", row, stages, steps=1001)
    refused(tmp_path, "cannot read latent .*No such file", tmp_path / "none.png", stages)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    refused(tmp_path, f"cannot read image {broken}: ", broken, stages)
    for name, shape in (("channels", (4, 8, 8)), ("empty", (3, 0, 8))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape))
        refused(
            tmp_path, r"is not one of VAE .*; allowed: \(batch, 3, height", tmp_path / f"{name}.npy", stages
        )


def test_a_stage_that_lost_its_weights(stages: tuple[Path, Path], picture: Path, tmp_path: Path) -> None:
    shutil.copytree(stages[0], tmp_path / "torn")
    (tmp_path / "torn/unet/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    refused(tmp_path, "cannot load the U-Net", picture, (tmp_path / "torn",))


@pytest.mark.usefixtures("ray_cluster")
def test_more_actors_than_the_cluster_can_run(
    latent_folder: Path, stages: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"the pool needs 9 CPUs, and the cluster has 4; lower --pool.size"):
        job(f"{latent_folder}#k3", tmp_path / "out.npy", stages, pool=WindowPool(size=9)).run()
