"""Generation on Ray actors: an image is a function of its request; what is refused before Ray starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from pipelines.generate import GeneratePools, Pool, Request, Sampler, check, generate
from tests.pipelines.images_by_hand import images_by_hand

# Of diffusers' Euler scheduler, with numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

MIXED = [
    Request(0, seed=7, guidance=3.0, num_inference_steps=4, scheduler="ddim"),
    Request(1, seed=7, guidance=1.0, num_inference_steps=3, scheduler="euler"),
    Request(None, seed=1, guidance=1.0, num_inference_steps=2, scheduler="ddpm"),
    Request(1, seed=3, guidance=2.0, num_inference_steps=4, scheduler="dpmpp"),
    Request(0, seed=8, guidance=3.0, num_inference_steps=4, scheduler="ddim"),
]


@pytest.fixture
def folder(checkpoint_folders: dict[str, Path]) -> Path:
    return checkpoint_folders["v_prediction"]


@pytest.mark.usefixtures("ray_cluster")
def test_images_come_in_the_order_of_the_requests_and_do_not_depend_on_the_company(
    folder: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers have another working directory than this process: relative folders must reach them.
    monkeypatch.chdir(vae_folder.parent)
    vae = check(folder, MIXED, f"./{vae_folder.name}")
    pools = GeneratePools(
        sampler=Pool(size=2, batch_size=3, num_cpus=0.5, threads=1),
        decoder=Pool(batch_size=2, num_cpus=0.5, threads=1),
    )
    made = generate(folder, MIXED, vae, pools)
    assert {line.split()[0] for line in made.where} == {"sampler", "decoder"}
    for image, request in zip(made.images, MIXED, strict=True):
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        (expected,) = images_by_hand(folder, vae_folder, [request])
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1
    assert len({image.tobytes() for image in made.images}) == len(MIXED)


def test_latents_alone_and_among_others(folder: Path) -> None:
    """Before decoding and rounding: 1e-5 in fp32."""
    requests = [Request(i % 2, 7 + i // 2, 3.0, 4, "ddim") for i in range(8)]

    def latents(chosen: list[Request]) -> torch.Tensor:
        columns = {
            "label": np.array([r.label for r in chosen]),
            "seed": np.array([r.seed for r in chosen]),
            "guidance": np.array([r.guidance for r in chosen]),
            "num_inference_steps": np.array([r.num_inference_steps for r in chosen]),
            "scheduler": np.array([r.scheduler for r in chosen]),
        }
        return torch.from_numpy(sampler(columns)["latent"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.generate.pick_device", lambda: torch.device("cpu"))
        sampler = Sampler(folder, threads=None)
    together = latents(requests)
    for index in (0, 3, 7):
        torch.testing.assert_close(latents([requests[index]])[0], together[index], rtol=0, atol=1e-5)


def test_check_names_the_vae_to_decode_with(folder: Path, vae_folder: Path, tmp_path: Path) -> None:
    assert check(folder, MIXED, None) == str(vae_folder)
    shutil.copytree(vae_folder, tmp_path / "copy")
    assert check(folder, MIXED, str(tmp_path / "copy")) == str(tmp_path / "copy")


def test_check_refuses_another_vae(folder: Path, other_vae_folder: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .* has latents of another VAE .* than .*other_vae"):
        check(folder, MIXED, str(other_vae_folder))


@pytest.mark.parametrize(
    ("prediction", "scheduler", "said"),
    [
        ("v_prediction", "flow_euler", "'flow_euler' cannot sample a ddpm model; allowed: ddim"),
        ("flow", "ddim", "'ddim' cannot sample a flow model; allowed: flow_euler"),
        ("flow", "eulr", "unknown scheduler 'eulr'; allowed: flow_euler"),
    ],
)
def test_check_refuses_a_scheduler_of_another_kind(
    checkpoint_folders: dict[str, Path], prediction: str, scheduler: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check(checkpoint_folders[prediction], [Request(0, 0, 1.0, 4, scheduler)], None)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(0, 0, 1.0, 1001, "ddim"), "1001 inference steps; allowed: 1 to 1000"),
        (Request(0, 0, -1.0, 4, "ddim"), "guidance -1.0; allowed"),
        (Request(0, -1, 1.0, 4, "ddim"), "seed -1; allowed"),
    ],
)
def test_check_looks_at_every_request(folder: Path, request_: Request, said: str) -> None:
    same = Request(0, 0, request_.guidance, request_.num_inference_steps, "ddim")
    with pytest.raises(UserError, match=said):
        check(folder, [MIXED[0], request_, same], None)


def test_check_refuses_what_is_no_checkpoint(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint: it has no ldm\.json; give a folder"):
        check(tmp_path, MIXED, None)
    shutil.copytree(folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/unet")
    with pytest.raises(UserError, match=r"has neither config\.json nor unet/config\.json"):
        check(tmp_path / "cut", MIXED, None)
