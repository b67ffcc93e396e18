import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from ldm import checkpoint
from ldm import unet as unets
from ldm.autoencoder import Autoencoder
from ldm.checkpoint import INFO_FILE, SCHEDULER_FILE, CheckpointInfo
from ldm.errors import UserError
from ldm.latents import Whitening

INFO = CheckpointInfo(
    step=1234,
    latent_shape=(4, 8, 8),
    shift=(0.1, -0.2, 1 / 3, 0.0),
    scale=(1.0, 2.0, 1e-3, 5.5),
    vae="s3://bucket/vae",
    vae_fingerprint="ab" * 32,
    class_names=("coffee", "façade"),
)
SCHEDULER: dict[str, object] = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return unets.build("tiny", in_channels=4, num_classes=2, sample_size=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(folder, ema=unet(1), last=unet(2), scheduler_config=SCHEDULER, info=INFO)
    return folder


@pytest.fixture
def stated(tmp_path: Path) -> Path:
    """A folder with ``ldm.json`` alone, for a test to damage."""
    (tmp_path / INFO_FILE).write_text(INFO.model_dump_json())
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.read_info(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_what_is_read(saved: Path) -> None:
    assert checkpoint.read_info(saved) == INFO
    assert checkpoint.read_scheduler_config(saved) == SCHEDULER
    assert checkpoint.read_info(saved).whitening == Whitening(INFO.shift, INFO.scale)


def test_the_folder_is_in_diffusers_layout(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [INFO_FILE, "scheduler", "unet", "unet_last"]
    loaded = UNet2DConditionModel.from_pretrained(saved, subfolder="unet", low_cpu_mem_usage=False)
    assert torch.equal(loaded.conv_in.weight, unet(1).conv_in.weight)


def test_the_average_is_what_is_sampled_and_the_last_is_kept(saved: Path) -> None:
    assert torch.equal(unets.load(saved).conv_in.weight, unet(1).conv_in.weight)
    assert torch.equal(unets.load(saved / "unet_last").conv_in.weight, unet(2).conv_in.weight)


def test_a_checkpoint_without_classes_is_read(stated: Path) -> None:
    unconditional = INFO.model_copy(update={"class_names": None})
    (stated / INFO_FILE).write_text(unconditional.model_dump_json())
    assert checkpoint.read_info(stated) == unconditional


def test_a_checkpoint_from_before_upsamplers_is_none(stated: Path) -> None:
    later = {"upsampling_factor", "max_noise_level", "residual_shift", "residual_scale"}
    (stated / INFO_FILE).write_text(INFO.model_dump_json(exclude=later))
    assert checkpoint.read_info(stated).upsampling_factor is None


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "scheduler").write_text("in the way")
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path, ema=unet(1), last=unet(2), scheduler_config=SCHEDULER, info=INFO)
    assert (tmp_path / "unet").is_dir()
    assert "is no checkpoint: it has no ldm.json" in refusal(tmp_path)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.endswith("has no ldm.json; give a folder that ldm train wrote")


@pytest.mark.parametrize("data", [b"", b"{", b'{"step": 1', b"\xff\xfe{}"])
def test_a_broken_file_is_told(stated: Path, data: bytes) -> None:
    (stated / INFO_FILE).write_bytes(data)
    assert f"{stated / INFO_FILE} cannot be read (JSON: " in refusal(stated)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"step": "many"}, "step: "),
        ({"format_version": 2}, "format_version: "),
        ({"latent_shape": [4, 8]}, "latent_shape.2: Field required"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_in_the_file_is_told(stated: Path, change: dict[str, object], where: str) -> None:
    (stated / INFO_FILE).write_text(json.dumps(json.loads(INFO.model_dump_json()) | change))
    assert where in refusal(stated)


def test_a_missing_field_is_told(stated: Path) -> None:
    (stated / INFO_FILE).write_text(INFO.model_dump_json(exclude={"vae_fingerprint"}))
    assert "vae_fingerprint: Field required" in refusal(stated)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "no JSON object"),
    ],
)
def test_a_broken_scheduler_config_is_told(tmp_path: Path, data: bytes | None, told: str) -> None:
    if data is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / SCHEDULER_FILE).write_bytes(data)
    with pytest.raises(UserError, match=told) as caught:
        checkpoint.read_scheduler_config(tmp_path)
    assert SCHEDULER_FILE in str(caught.value)


def test_a_checkpoint_goes_with_its_own_vae_only() -> None:
    torch.manual_seed(0)
    layout = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    vae, other = (Autoencoder(AutoencoderTiny(**layout, **blocks), name) for name in ("mine", "theirs"))
    checkpoint.check_vae(vae, vae.fingerprint, "checkpoint out/model")
    with pytest.raises(UserError) as caught:
        checkpoint.check_vae(other, vae.fingerprint, "checkpoint out/model")
    assert str(caught.value) == (
        f"checkpoint out/model has latents of another VAE ({vae.fingerprint[:12]}) than theirs "
        f"({other.fingerprint[:12]}); give the VAE that encoded it"
    )
