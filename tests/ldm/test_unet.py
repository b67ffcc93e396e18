import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import unet as unets
from ldm.conditioning import ClassConditioner, Conditioning, EmbeddingConditioner
from ldm.errors import UserError
from ldm.sampling import Trajectory, denoise_step

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_PRESETS = [name for name, preset in unets.PRESETS.items() if preset.cross_attention_dim is None]

# unet/config.json of stabilityai/stable-diffusion-2-1, as published.
SD21_CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": True,
    "use_linear_projection": True,
}
# The same layout, a tenth as wide.
NARROW_CONFIG = SD21_CONFIG | {
    "attention_head_dim": [1, 2, 4, 4],
    "block_out_channels": [32, 64, 128, 128],
    "cross_attention_dim": 16,
}


def tiny(num_classes: int | None = 3, **options: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return unets.build("tiny", in_channels=4, num_classes=num_classes, sample_size=8, **options).eval()


def labels(*values: int) -> Conditioning:
    return Conditioning(class_labels=torch.tensor(values))


def latents(num_images: int, size: int = 8) -> Tensor:
    return torch.randn(num_images, 4, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def narrow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the Stable Diffusion 2.1 layout, written by diffusers itself."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd21") / "unet"
    UNet2DConditionModel.from_config(NARROW_CONFIG).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", unets.PRESETS)
def test_the_table_states_the_parameters(name: str) -> None:
    with torch.device("meta"):
        unet = unets.build(name, in_channels=4, num_classes=None, sample_size=8)
    assert sum(parameter.numel() for parameter in unet.parameters()) == unets.PRESETS[name].num_params


@pytest.mark.parametrize("name", CLASS_PRESETS)
@torch.no_grad()
def test_class_presets_run_without_embeddings(name: str) -> None:
    # The shapes of the wide ones are checked on the meta device, which computes nothing.
    with torch.device("cpu" if name == "tiny" else "meta"):
        unet = unets.build(name, in_channels=4, num_classes=3, sample_size=8)
        prediction = unets.predict(unet, torch.zeros(2, 4, 8, 8), torch.tensor([7, 999]), labels(0, 3))
    assert prediction.shape == (2, 4, 8, 8)
    assert unet.class_embedding.num_embeddings == 4


def test_the_class_and_the_timestep_of_a_row_count_for_that_row_only() -> None:
    unet, x = tiny(), latents(1).repeat(3, 1, 1, 1)
    with torch.no_grad():
        base = unets.predict(unet, x, torch.tensor([5.0, 5.0, 5.0]), labels(0, 0, 0))
        other = unets.predict(unet, x, torch.tensor([5.0, 5.0, 6.5]), labels(0, 3, 0))
    torch.testing.assert_close(other[0], base[0])
    assert (other[1] - base[1]).abs().max() > 1e-3
    assert (other[2] - base[2]).abs().max() > 1e-5


def test_an_upsampler_takes_more_channels_than_it_gives() -> None:
    with torch.device("meta"):
        unet = unets.build("base", in_channels=8, out_channels=4, num_classes=None, sample_size=16)
        prediction = unets.predict(unet, torch.zeros(1, 8, 16, 16), torch.tensor([1]), Conditioning())
    assert prediction.shape == (1, 4, 16, 16)


def test_predict_answers_in_the_inputs_dtype() -> None:
    unet = tiny().to(torch.bfloat16)
    with torch.no_grad():
        prediction = unets.predict(unet, latents(1), torch.tensor([3.0]), labels(1))
    assert prediction.dtype == torch.float32


def test_padding_of_embeddings_is_not_attended_to() -> None:
    unet = tiny(num_classes=None, cross_attention_dim=16)
    long, short = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
    conditioner, x, t = EmbeddingConditioner(torch.zeros(1, 16)), latents(2), torch.tensor([10, 900])
    with torch.no_grad():
        together = unets.predict(unet, x, t, conditioner.encode([long, short[:2]]))
        alone = unets.predict(unet, x[1:], t[1:], conditioner.encode([short[:2]]))
        unmasked = unets.predict(unet, x[1:], t[1:], conditioner.encode([short]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)
    assert (unmasked - alone).abs().max() > 1e-4


def test_size_multiple_is_where_the_unet_begins_to_fail() -> None:
    unet = tiny()
    assert unets.size_multiple(unet) == 4
    with torch.no_grad():
        assert unets.predict(unet, latents(1, 12), torch.tensor([1]), labels(0)).shape[-1] == 12
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            unets.predict(unet, latents(1, 10), torch.tensor([1]), labels(0))


def test_any_size_fits_cross_attention() -> None:
    unet = tiny(num_classes=None, cross_attention_dim=16)
    condition = Conditioning(embeddings=torch.zeros(1, 2, 16))
    assert unets.size_multiple(unet) == 1
    with torch.no_grad():
        assert unets.predict(unet, latents(1, 7), torch.tensor([1]), condition).shape[-1] == 7


def test_sd21_is_the_published_layout() -> None:
    with torch.device("meta"):
        unet = unets.build("sd21", in_channels=4, num_classes=None, sample_size=96)
        published = UNet2DConditionModel.from_config(SD21_CONFIG)
    built = json.loads(json.dumps(dict(unet.config)))
    assert {key: built[key] for key in SD21_CONFIG} == SD21_CONFIG
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in published.state_dict().items()}
    assert sum(parameter.numel() for parameter in unet.parameters()) == 865_910_724


@torch.no_grad()
def test_sd21_takes_text_embeddings_at_full_size() -> None:
    with torch.device("meta"):
        unet = unets.build("sd21", in_channels=4, num_classes=None, sample_size=64)
        text = Conditioning(embeddings=torch.zeros(2, 77, 1024))
        prediction = unets.predict(unet, torch.zeros(2, 4, 64, 64), torch.zeros(2), text)
    assert prediction.shape == (2, 4, 64, 64)


@pytest.mark.parametrize("as_pipeline", [False, True])
def test_a_stable_diffusion_folder_is_loaded_and_stepped(narrow_folder: Path, as_pipeline: bool) -> None:
    unet = unets.load(narrow_folder.parent if as_pipeline else narrow_folder)
    stored = load_file(narrow_folder / WEIGHTS)
    assert unet.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in unet.state_dict().items())
    conditioner = EmbeddingConditioner(torch.zeros(77, 16))
    trajectory = Trajectory(
        shape=(4, 8, 8),
        scheduler="ddim",
        scheduler_config={
            "_class_name": "PNDMScheduler",
            "prediction_type": "v_prediction",
            "steps_offset": 1,
        },
        num_inference_steps=2,
        guidance=7.5,
        seed=0,
        condition=conditioner.encode([torch.ones(77, 16)]),
        null=conditioner.null,
    )
    before = trajectory.latent
    denoise_step(unet, [trajectory])
    assert trajectory.progress == 0.5
    assert trajectory.latent.isfinite().all()
    assert not torch.equal(trajectory.latent, before)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    unet = tiny().to(memory_format=torch.channels_last)
    unets.save(unet, tmp_path / "checkpoint" / "unet")
    again = unets.load(tmp_path / "checkpoint")
    assert again.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in unet.state_dict().items())
    unets.save(again, tmp_path / "copy")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "checkpoint/unet" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "copy"]


def test_a_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    """Not of the place, the precision, or a config that leaves out what has the default."""
    unet = tiny()
    stated = unets.fingerprint(unet)
    unets.save(unet, tmp_path / "unet")
    assert unets.fingerprint(unets.load(tmp_path / "unet")) == stated
    config = json.loads((tmp_path / "unet/config.json").read_text())
    brief = {key: config[key] for key in config.keys() - {"act_fn", "norm_eps", "flip_sin_to_cos"}}
    (tmp_path / "unet/config.json").write_text(json.dumps(brief | {"sample_size": 16}))
    assert unets.fingerprint(unets.load(tmp_path / "unet")) == stated
    with torch.no_grad():
        unet.conv_out.bias[1].add_(1e-3)
    assert unets.fingerprint(unet) != stated
    (tmp_path / "unet/config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    assert unets.fingerprint(unets.load(tmp_path / "unet")) != stated


def test_save_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        unets.save(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_half_precision_files_alone_are_loaded_as_fp32(tmp_path: Path) -> None:
    unet = tiny()
    unet.half().save_pretrained(tmp_path, variant="fp16")
    again = unets.load(tmp_path)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor.float(), again.state_dict()[n]) for n, tensor in unet.state_dict().items())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        unets.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    assert "no U-Net folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_config_is_told(tmp_path: Path) -> None:
    assert "neither config.json nor unet/config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "not JSON"),
        ("[]", "describes a None"),
        ('{"_class_name": "AutoencoderKL"}', "describes a AutoencoderKL"),
    ],
)
def test_another_config_is_told(tmp_path: Path, config: str, told: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert told in refusal(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    tiny().save_config(tmp_path)
    assert "has no weights" in refusal(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    assert "pickled weights" in refusal(tmp_path)


def test_cut_off_weights_are_told(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:5000])
    assert "cannot load the U-Net" in refusal(tmp_path)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_weights_of_another_layout_are_told(tmp_path: Path, change: str) -> None:
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    if change == "missing":
        del weights["conv_out.bias"]
    else:
        weights["conv_more.bias"] = torch.zeros(1)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert "do not fit its config.json: 1 such as conv_" in refusal(tmp_path)


def test_weights_of_another_width_are_told(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    assert "cannot load the U-Net" in refusal(tmp_path)


def test_an_unknown_preset_is_told() -> None:
    with pytest.raises(UserError, match="allowed: tiny, small, base, large, sd21"):
        unets.build("huge", in_channels=4, num_classes=None, sample_size=8)


def test_the_null_class_is_the_last_embedding() -> None:
    null = ClassConditioner(["a", "b", "c"]).null.class_labels
    assert null is not None
    assert int(null) == tiny(num_classes=3).class_embedding.num_embeddings - 1
