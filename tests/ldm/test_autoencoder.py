import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.autoencoder import PRESETS, Autoencoder, build, default_names, load
from ldm.autoencoder import __file__ as autoencoder_file
from ldm.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"

# config.json of stabilityai/sd-vae-ft-mse, as published: it does not state the scaling factor.
SD_CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
# The same layout, some twelve times narrower.
NARROW_CONFIG = SD_CONFIG | {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8}
# Its file names the attention's weights as diffusers did in 2022.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

TINY_CONFIG = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
    "latent_channels": 5,
}
DC_CONFIG = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_out_channels": (8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 16, 16),
    "encoder_layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), ()),
}


def images(size: int, num_images: int = 1) -> Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def write(folder: Path, **changes: object) -> Path:
    """A folder with random weights in the narrow layout; a change to None takes the key away."""
    torch.manual_seed(0)
    config = {key: value for key, value in (NARROW_CONFIG | changes).items() if value is not None}
    AutoencoderKL.from_config(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sd") / "vae")


@pytest.fixture
def folder(shared_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(shared_folder, tmp_path / "vae"))


def refusal(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stable_diffusion_folder_encodes_and_decodes_512_pixels(shared_folder: Path) -> None:
    vae = load(shared_folder)
    assert (vae.f, vae.channels) == (8, 4)
    moments = vae.encode(images(512))
    assert moments.mean_BChw.shape == moments.std_BChw.shape == (1, 4, 64, 64)
    assert moments.mean_BChw.dtype == torch.float32
    assert moments.std_BChw.min() > 0
    decoded = vae.decode(moments.mode())
    assert decoded.shape == (1, 3, 512, 512)
    assert decoded.abs().max() <= 1


def test_encode_and_decode_are_those_of_diffusers(shared_folder: Path) -> None:
    vae, reference = (
        load(shared_folder),
        AutoencoderKL.from_pretrained(shared_folder, low_cpu_mem_usage=False),
    )
    x = images(32, 2)
    with torch.no_grad():
        posterior = reference.encode(x).latent_dist
        decoded = reference.decode(posterior.mean).sample.clamp(-1, 1)
    moments = vae.encode(x)
    assert torch.equal(moments.mean_BChw, posterior.mean)
    assert torch.equal(moments.std_BChw, posterior.std)
    assert torch.equal(vae.decode(moments.mean_BChw), decoded)


@pytest.mark.parametrize("stated", [None, 0.18215, 0.5])
def test_the_scaling_factor_is_the_one_of_the_config(tmp_path: Path, stated: float | None) -> None:
    whitening = load(write(tmp_path / "vae", scaling_factor=stated)).whitening
    z = images(8)[:, :1].repeat(1, 4, 1, 1)
    torch.testing.assert_close(whitening.normalise(z), z * (stated or 0.18215))
    assert whitening.shift_C == (0, 0, 0, 0)


def test_the_shift_factor_is_applied_before_the_scaling_factor(tmp_path: Path) -> None:
    whitening = load(write(tmp_path / "vae", scaling_factor=1.5, shift_factor=0.25)).whitening
    z = images(8)[:, :1].repeat(1, 4, 1, 1)
    torch.testing.assert_close(whitening.normalise(z), (z - 0.25) * 1.5)


def test_means_and_stds_of_latents_are_applied_as_diffusers_pipelines_do(tmp_path: Path) -> None:
    mean, std, factor = [0.1, -2.0, 3.0, 0.5], [1.0, 2.0, 0.5, 4.0], 0.6
    config = {"latents_mean": mean, "latents_std": std, "scaling_factor": factor}
    whitening = load(write(tmp_path / "vae", **config)).whitening
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    # The line of the Stable Diffusion XL pipeline that comes before its decoder.
    as_decoded = x * torch.tensor(std).view(1, 4, 1, 1) / factor + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(whitening.denormalise(x), as_decoded)
    torch.testing.assert_close(whitening.normalise(as_decoded), x)


def test_the_sd_preset_is_the_published_layout() -> None:
    with torch.device("meta"):
        vae, published = build("sd"), AutoencoderKL.from_config(SD_CONFIG)
    built = json.loads(json.dumps(dict(vae.config)))
    ours = {key: value for key, value in SD_CONFIG.items() if not key.startswith("_")}
    assert {key: built[key] for key in ours} == ours
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in published.state_dict().items()}
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863


@torch.no_grad()
def test_the_sd_preset_runs_at_full_size() -> None:
    with torch.device("meta"):
        vae = build("sd")
        posterior = vae.encode(torch.zeros(1, 3, 512, 512)).latent_dist
        assert posterior.mean.shape == (1, 4, 64, 64)
        assert vae.decode(posterior.mean).sample.shape == (1, 3, 512, 512)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_factor_of_their_name(name: str) -> None:
    with torch.device("meta" if name == "sd" else "cpu"):
        vae = Autoencoder(build(name))
    assert vae.f == (8 if name == "sd" else int(name[1:]))
    assert vae.channels == PRESETS[name].latent_channels


def test_an_unknown_preset_is_told() -> None:
    with pytest.raises(UserError, match="no VAE preset 'f5'; allowed: f4, f8, f16, sd"):
        build("f5")


@pytest.mark.parametrize(
    ("vae_class", "config", "f"), [(AutoencoderTiny, TINY_CONFIG, 4), (AutoencoderDC, DC_CONFIG, 8)]
)
def test_deterministic_autoencoders_have_no_spread(
    tmp_path: Path, vae_class: type[AutoencoderTiny | AutoencoderDC], config: dict[str, object], f: int
) -> None:
    torch.manual_seed(0)
    vae_class(**config).save_pretrained(tmp_path)
    vae = load(tmp_path)
    assert (type(vae.vae), vae.f, vae.channels) == (vae_class, f, config["latent_channels"])
    moments = vae.encode(images(32, 2))
    assert moments.mean_BChw.shape == (2, vae.channels, 32 // f, 32 // f)
    assert moments.mean_BChw.std() > 0
    assert not moments.std_BChw.any()
    assert vae.decode(moments.mean_BChw).shape == (2, 3, 32, 32)
    assert vae.whitening.scale_C == (1.0,) * vae.channels


def test_the_default_models_are_there_and_small() -> None:
    assert set(default_names()) == {"f4", "f8", "f16"}
    weights = list((Path(autoencoder_file).parent / "assets").glob("*/*.safetensors"))
    assert len(weights) == 3 and max(file.stat().st_size for file in weights) <= 5_000_000


@pytest.mark.parametrize("name", default_names())
def test_a_default_model_encodes_and_decodes(name: str) -> None:
    vae, x = load(name), images(64)
    moments = vae.encode(x)
    assert vae.f == int(name.removeprefix("f"))
    assert moments.mean_BChw.shape == (1, vae.channels, 64 // vae.f, 64 // vae.f)
    assert vae.decode(moments.mode()).shape == (1, 3, 64, 64)


def test_a_pipeline_folder_stands_for_its_vae(folder: Path) -> None:
    (folder.parent / "model_index.json").write_text("{}")
    assert load(folder.parent).fingerprint == load(folder).fingerprint


def test_attention_weights_may_have_their_old_names(folder: Path, shared_folder: Path) -> None:
    def rename(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if ".attentions." in name]:
            old = name
            for new_part, old_part in OLD_NAMES.items():
                old = old.replace(f".{new_part}.", f".{old_part}.")
            weights[old] = weights.pop(name)

    rewrite_weights(folder, rename)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / WEIGHTS)
    assert load(folder).fingerprint == load(shared_folder).fingerprint


def test_half_precision_files_alone_are_loaded_as_fp32(folder: Path, tmp_path: Path) -> None:
    vae = load(folder).vae.half()
    vae.save_pretrained(tmp_path / "half", variant="fp16")
    assert not (tmp_path / "half" / WEIGHTS).exists()
    again = load(tmp_path / "half").vae.state_dict()
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    assert all(torch.equal(tensor.float(), again[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_put_together(folder: Path, tmp_path: Path, variant: str | None) -> None:
    vae = load(folder).vae
    vae.save_pretrained(tmp_path / "sharded", max_shard_size="200KB", variant=variant)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert load(tmp_path / "sharded").fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("below", ["", "/vae"])
def test_a_vae_is_loaded_from_an_fsspec_url(folder: Path, below: str) -> None:
    url = f"memory://test_autoencoder{below.replace('/', '_')}"
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), f"{url}{below}", recursive=True)
    try:
        assert sorted(Path(path).name for path in remote.ls(f"{url}{below}", detail=False)) == [
            "config.json",
            WEIGHTS,
        ]
        vae = load(url)
    finally:
        remote.rm(url, recursive=True)
    assert (vae.name, vae.fingerprint) == (url, load(folder).fingerprint)


def test_the_fingerprint_is_that_of_the_function(folder: Path, tmp_path: Path) -> None:
    original = load(folder)
    original.vae.save_pretrained(tmp_path / "copy")
    rescaled = write(tmp_path / "rescaled", scaling_factor=0.3)
    resized = write(tmp_path / "resized", sample_size=64)
    same = {load(path).fingerprint for path in (folder, tmp_path / "copy", rescaled, resized)}
    assert same == {original.fingerprint}
    assert len(original.fingerprint) == 64


def test_one_bit_of_one_weight_changes_the_fingerprint(folder: Path) -> None:
    before = load(folder).fingerprint

    def nudge(weights: dict[str, Tensor]) -> None:
        bias = weights["decoder.conv_out.bias"]
        bias[1] = torch.nextafter(bias[1], torch.tensor(torch.inf))

    rewrite_weights(folder, nudge)
    assert load(folder).fingerprint != before


def test_another_layout_changes_the_fingerprint(folder: Path) -> None:
    before = load(folder).fingerprint
    # The number of groups is in no weight's shape.
    (folder / "config.json").write_text(json.dumps(NARROW_CONFIG | {"norm_num_groups": 4}))
    assert load(folder).fingerprint != before


@pytest.mark.parametrize("size", [(33, 32), (32, 36), (0, 32)])
def test_a_size_that_is_no_multiple_of_f_is_told(shared_folder: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        load(shared_folder).encode(torch.zeros(1, 3, *size))


def test_the_nearest_size_that_fits_is_told(shared_folder: Path) -> None:
    with pytest.raises(UserError, match=r"of 500×333 pixels does not fit .*; use 504×336"):
        load(shared_folder).check_size(height=333, width=500)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 16, 4, 4), (4, 4, 4)])
def test_a_latent_of_another_shape_is_told(shared_folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"allowed: \(batch, 4, height/8, width/8\)"):
        load(shared_folder).decode(torch.zeros(shape))


@pytest.mark.parametrize("source", ["/nowhere/vae", "./nowhere", "nowhere", "some/where/else", "a b/c"])
def test_a_missing_folder_is_told(source: str) -> None:
    assert f"no VAE at {source!r}; allowed: " in refusal(source)


def test_a_folder_without_config_is_told(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_folder_without_weights_is_told(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "has no weights" in refusal(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "pickle files are refused" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "is a None; allowed: AutoencoderKL, "),
        ('{"_class_name": "UNet2DConditionModel"}', "is a UNet2DConditionModel; allowed: AutoencoderKL, "),
        (json.dumps(NARROW_CONFIG | {"down_block_types": ["NoBlock"] * 4}), "cannot load VAE"),
        (json.dumps(NARROW_CONFIG | {"block_out_channels": 16}), "cannot load VAE"),
    ],
)
def test_another_config_is_told(folder: Path, config: str, told: str) -> None:
    (folder / "config.json").write_text(config)
    assert told in refusal(folder)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_weights_of_another_layout_are_told(folder: Path, change: str) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        if change == "missing":
            del weights["encoder.conv_out.bias"]
        else:
            weights["encoder.conv_out.more"] = torch.zeros(1)

    rewrite_weights(folder, damage)
    assert "do not fit its config.json: 1 such as encoder.conv_out." in refusal(folder)


def test_weights_of_another_width_are_told(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(NARROW_CONFIG | {"block_out_channels": [16, 16, 32, 64]}))
    assert "cannot load VAE" in refusal(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 5000])
def test_cut_off_weights_are_told(folder: Path, num_bytes: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:num_bytes])
    assert "cannot load VAE" in refusal(folder)


def test_a_url_without_a_vae_is_told() -> None:
    assert "cannot read VAE 'memory://nowhere'" in refusal("memory://nowhere")
    assert "cannot use nothing://x/y" in refusal("nothing://x/y")


def test_a_hub_that_is_switched_off_is_told() -> None:
    message = refusal("nobody-at-all/no-such-vae")
    assert "the model hub cannot be reached for VAE 'nobody-at-all/no-such-vae'" in message
    assert "give a local folder in diffusers' format" in message


def test_a_hub_that_refuses_the_connection_is_told(tmp_path: Path) -> None:
    # A process of its own: huggingface_hub reads these when it is imported. Port 9 has no server.
    run = (
        "from ldm.autoencoder import load\nfrom ldm.errors import UserError\n"
        "try: load('nobody-at-all/no-such-vae')\nexcept UserError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "the model hub cannot be reached for VAE 'nobody-at-all/no-such-vae'" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
