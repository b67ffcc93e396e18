"""What every subcommand answers to bad input: one line, status 2, and nothing written."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import cli
from pipelines.shards import Sample, write_tar

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def there(
    tmp_path: Path,
    latent_folder: Path,
    checkpoint_folders: dict[str, Path],
    vae_folder: Path,
    other_vae_folder: Path,
    photo: Callable[[int], bytes],
) -> dict[str, Path]:
    """By name: what a command line may point at, good and bad. ``out`` is not there."""
    folder = tmp_path / "in"
    for name in ("empty", "photos", "no_image", "no_weights", "pictures", "text"):
        (folder / name).mkdir(parents=True)
    write_tar(folder / "photos/a.tar", [Sample("a", photo(0))])
    write_tar(folder / "no_image/a.tar", [Sample("a", None, {"json": b"{}"})])
    shutil.copyfile(vae_folder / "config.json", folder / "no_weights/config.json")
    (folder / "pictures/a.png").write_bytes(photo(0))
    (folder / "text/a.txt").write_text("a caption without a picture")
    return {
        **{path.name: path for path in folder.iterdir()},
        "missing": folder / "missing",
        "file": folder / "photos/a.tar",
        "latents": latent_folder,
        "checkpoint": checkpoint_folders["v_prediction"],
        "vae": vae_folder,
        "other": other_vae_folder,
        "out": tmp_path / "out",
    }


BAD = [
    ("shards {missing} {out}", "no such folder"),
    ("shards {empty} {out}", "no image in"),
    ("shards {text} {out}", "no image in"),
    ("encode {missing} {out} --vae {vae}", "no such input"),
    ("encode {empty} {out} --vae {vae}", "no shards in"),
    ("encode {no_image} {out} --vae {vae}", "no usable image"),
    ("encode {photos} {out} --vae {missing}", "no VAE at"),
    ("encode {photos} {out} --vae {empty}", "has no config.json"),
    ("encode {photos} {out} --vae {no_weights}", "has no weights"),
    ("encode {photos} {out} --vae {vae} --preprocess.sizes-px 30", "multiples of 4"),
    ("encode {photos} {out} --vae nobody/such-vae", "the model hub cannot be reached"),
    ("bench encode --only warp", "only"),
    ("bench train --only warp", "only"),
    ("bench tiling --only warp", "only"),
    ("bench serve --only warp", "only"),
    ("bench cluster --only warp", "only"),
    ("bench cluster --counts 2,4", "counts"),
    ("encode in out --subcluster encode", "subcluster"),
    ("serve {pictures}", "is no model"),
    ("serve {checkpoint} --host 0.0.0.0", "no API keys"),
    ("verify {missing}", "no such latent dataset"),
    ("verify {empty}", "it has no dataset.json"),
    ("verify {latents} --deep", "--deep needs the input that was encoded"),
    ("verify {latents} --input {missing}", "no such input"),
    ("gc {missing}", "no such latent dataset"),
    ("gc {empty} --delete", "it has no dataset.json"),
    ("stats {missing}", "no such latent dataset"),
    ("stats {empty}", "it has no dataset.json"),
    ("train {missing} {out}", "no such latent dataset"),
    ("train {empty} {out}", "it has no dataset.json"),
    ("train {latents} {out} --vae {other}", "latents of another VAE"),
    ("train {latents} {out} --vae {no_weights}", "has no weights"),
    ("train {latents} {out} --train.batch-size 64", "cannot fill a batch of 64"),
    ("train {latents} {out} --train.batch-size 8 --train.preset huge", "no U-Net preset 'huge'"),
    ("train {latents} {vae} --train.batch-size 8", "is not empty; give a new folder"),
    ("train {latents} {file} --train.batch-size 8", "is a file; give a new folder"),
    ("train-vae {missing} {out}", "no such input"),
    ("train-vae {empty} {out}", "no shards in"),
    ("train-vae {no_image} {out}", "no usable image"),
    ("train-vae {photos} {out} --train.crop-px 30", "multiples of 8"),
    ("train-vae {photos} {out} --train.init {no_weights}", "has no weights"),
    ("train-vae {photos} {out} --train.init nobody/such-vae", "the model hub cannot be reached"),
    ("train-vae {photos} {vae}", "is not empty; give a new folder"),
    ("evaluate recon {missing} --vae {vae} --pictures {out}", "no such input"),
    ("evaluate recon {empty} --vae {vae} --pictures {out}", "no shards in"),
    ("evaluate recon {photos} --vae {no_weights} --pictures {out}", "has no weights"),
    ("evaluate recon {photos} --vae {vae} --preprocess.sizes-px 30 --pictures {out}", "multiples of 4"),
    ("evaluate recon {photos} --vae nobody/such-vae --pictures {out}", "the model hub cannot be reached"),
    (
        "evaluate recon {photos} --vae {vae} --preprocess.sizes-px 32 --extractor incepton",
        "no feature extractor",
    ),
    ("evaluate recon {photos} --vae {vae} --preprocess.sizes-px 32 --perceptual lpisp", "no perceptual dist"),
    ("evaluate samples {missing} --reference {photos}", "is no checkpoint"),
    ("evaluate samples {checkpoint} --reference {missing} --extractor random", "no such input"),
    ("evaluate samples {checkpoint} --reference {photos} --extractor {photos}", "no feature extractor"),
    ("evaluate samples {checkpoint} --reference {photos} --vae {other}", "latents of another VAE"),
    ("evaluate samples {checkpoint} --reference {photos} --steps 4,1001", "1001 inference steps"),
    ("evaluate samples {checkpoint} --reference {photos} --guidance -1", "greater than or equal to 0"),
    ("evaluate samples {checkpoint} --reference {photos} --preprocess.sizes-px 64", "is 64; allowed: 32"),
    ("evaluate samples {checkpoint} --reference {photos} --preprocess.crop none", "crop center or random"),
    ("evaluate by-f {missing} --vaes {vae} --page {out} --plot {out}.png", "no such input"),
    ("evaluate by-f {photos} --vaes {vae},{no_weights} --page {out}", "has no weights"),
    ("evaluate by-f {photos} --vaes {vae} --preprocess.sizes-px 30 --page {out}", "multiples of 4"),
    ("savings --size-px 100 --page {out}", "size 100 px; allowed: multiples of 64"),
    ("savings --measured-size-px 100 --page {out}", "size 100 px; allowed: multiples of 64"),
    ("savings --preset sd21 --page {out}", "no U-Net preset 'sd21' without text; allowed: tiny, small"),
    ("savings --preset huge --page {out}", "no U-Net preset 'huge'"),
    ("savings --quantise --checkpoint {missing} --page {out}", "is no checkpoint"),
    ("savings --quantise --vae {no_weights} --page {out}", "has no weights"),
    ("savings --quantise --measured-size-px 100 --page {out}", "multiples of 8"),
    ("savings --quantise --extractor incepton --page {out}", "no feature extractor"),
    ("runs {empty}", "no runs are recorded beside"),
    ("plan {missing}", "no such plan"),
    ("plan {pictures}/a.png", "give a YAML file"),
    ("sample {missing} --out {out}", "is no checkpoint"),
    ("sample {empty} --out {out}", "is no checkpoint"),
    ("sample {checkpoint} --out {out} --classes cta", "unknown class 'cta'"),
    ("sample {checkpoint} --out {out} --classes 2", "unknown class '2'"),
    ("sample {checkpoint} --out {out} --vae {other}", "latents of another VAE"),
    ("sample {checkpoint} --out {out} --vae {no_weights}", "has no weights"),
    ("sample {checkpoint} --out {out} --scheduler flow_euler", "cannot sample a ddpm model"),
    ("sample {checkpoint} --out {out} --steps 1001", "1001 inference steps"),
    ("generate {missing} {out} --num-images 4", "is no checkpoint"),
    ("generate {checkpoint} {out}", "--num-images is missing"),
    ("generate {checkpoint} {photos} --num-images 4", "is there already"),
    ("generate {checkpoint} {file} --num-images 4", "is there already"),
    ("generate {checkpoint} {out} --num-images 4 --classes cta", "unknown class 'cta'"),
    ("generate {checkpoint} {out} --num-images 4 --vae {other}", "latents of another VAE"),
    ("generate {checkpoint} {out} --num-images 4 --steps 1001", "1001 inference steps"),
    ("interpolate {pictures}/a.png --vae {vae} --out {out}", "1 ends; allowed: two"),
    ("interpolate {pictures}/a.png seed:1 --checkpoint {checkpoint} --out {out}", "ends of two kinds"),
    ("interpolate seed:1 seed:2 --out {out}", "give --checkpoint"),
    ("interpolate seed:1 seed:x --checkpoint {checkpoint} --out {out}", "end 'seed:x'; allowed: seed:N"),
    ("interpolate {latents}#k0 {latents}#k1 --checkpoint {checkpoint} --out {out}", "takes no --checkpoint"),
    ("interpolate {latents}#k0 {latents}#k1 --vae {other} --out {out}", "latents of another VAE"),
    ("edit {missing} --checkpoint {checkpoint} --out {out}", "cannot read"),
    ("edit {file} --checkpoint {checkpoint} --out {out}", "is no image that can be read: not_an_image"),
    ("edit {pictures}/a.png --out {out}", "one of --checkpoint and --direction"),
    (
        "edit {pictures}/a.png --checkpoint {checkpoint} --strength 0,1.5 --out {out}",
        "strength 1.5; allowed: 0",
    ),
    ("edit {pictures}/a.png --checkpoint {checkpoint} --strength=-0.1 --out {out}", "strength -0.1; allowed"),
    ("edit {pictures}/a.png --checkpoint {checkpoint} --vae {other} --out {out}", "latents of another VAE"),
    (
        "edit {pictures}/a.png --checkpoint {checkpoint} --denoise.class-name cta --out {out}",
        "unknown class 'cta'",
    ),
    ("edit {pictures}/a.png --direction {file} --out {out}", "cannot read direction"),
    ("inpaint {pictures}/a.png {missing} --checkpoint {checkpoint} --out {out}", "cannot read"),
    ("inpaint {pictures}/a.png {file} --checkpoint {checkpoint} --out {out}", "is no image that can be read"),
    ("inpaint {pictures}/a.png {missing} --checkpoint {empty} --out {out}", "is no checkpoint"),
    (
        "inpaint {pictures}/a.png {missing} --checkpoint {checkpoint} --strength 2 --out {out}",
        "strength 2; allowed",
    ),
    ("direction {missing} cat {out}.safetensors", "no such latent dataset"),
    ("direction {latents} cta {out}.safetensors", "unknown class 'cta'"),
    ("direction {latents} cat {out}.safetensors --by caption", "has no captions"),
    ("direction {latents} cat {out}.npy", "ends in .safetensors"),
    ("decode {missing} {out}.png --vae {vae}", "cannot read latent"),
    ("decode {latents}#owl {out}.png", "no row 'owl'"),
    ("decode {latents}#k0 {out}.png --vae {other}", "latents of another VAE"),
    ("decode {latents}#k0 {out}.png --vae f8", "latents of another VAE"),
    ("decode {latents}#k0 {out}.jpg", "no known format"),
    ("decode {latents}#k0 {out}.png --tiling.tile 0", "tile"),
    ("decode {latents}#k0 {out}.png --tiling.mode blended", "mode"),
    ("decode {latents}#k0 {out}.png --crop-px 33,32", "33×32 px of an image of 32×32 px"),
    ("upscale {pictures}/a.png {out}.png --stages {checkpoint}", "no upsampler"),
    ("upscale {missing}.npy {out}.png --stages {checkpoint}", "cannot read latent"),
    ("cluster up --host 0.0.0.0", "others reach 0.0.0.0"),
    ("cluster up --token-file {missing}", "cannot read the token file"),
    ('cluster up --pools {{"Encode_GPU":{{}}}}', "names have up to 32"),
    ("submit {missing}.yaml", "cannot read"),
    ("chain {missing}.yaml", "cannot read"),
    ("jobs list --address http://127.0.0.1:9", "no job server at http://127.0.0.1:9"),
    ("jobs logs ID --address 127.0.0.1:9", "http://HOST:PORT"),
    ("jobs stop ID --address http://127.0.0.1:9", "no job server at http://127.0.0.1:9"),
]


def files(there: dict[str, Path]) -> set[Path]:
    return {path for place in there.values() for path in place.parent.rglob("*")}


def assert_refused(command: str, said: str, status: int, err: str) -> None:
    name = next(name for name in sorted(cli.COMMANDS, key=len, reverse=True) if command.startswith(name))
    assert status == 2
    assert err.startswith(f"ldm {name}: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(("command", "said"), BAD, ids=[command for command, _ in BAD])
def test_one_line_status_2_and_nothing_written(
    command: str,
    said: str,
    there: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    # All of these are found before Ray is needed.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    before = files(there)
    status = cli.main(command.format(**there).split())
    out, err = capsys.readouterr()
    assert_refused(command, said, status, err)
    assert out == ""
    assert files(there) == before


def test_every_command_is_here_but_the_demo() -> None:
    named = {name for name in cli.COMMANDS for command, _ in BAD if command.startswith(f"{name} ")}
    assert named == set(cli.COMMANDS) - {"demo"}


@pytest.mark.usefixtures("ray_cluster")
def test_encoding_into_a_dataset_of_another_vae_leaves_it_as_it_is(
    there: dict[str, Path], write_latents: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_latents(there["out"], class_names=None)
    before = {path: path.read_bytes() for path in there["out"].rglob("*") if path.is_file()}
    command = "encode {photos} {out} --vae {other} --preprocess.sizes-px 32 --unit-size 8"
    status = cli.main(command.format(**there).split())
    assert_refused(
        command, "holds latents of another kind (vae_fingerprint: ", status, capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in there["out"].rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("ray_cluster")
def test_evaluating_shards_without_a_usable_image(
    there: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = "evaluate recon {no_image} --vae {vae} --preprocess.sizes-px 32 --pictures {out}"
    status = cli.main(command.format(**there).split())
    assert_refused(command, "none of 1 images can be read", status, capsys.readouterr().err)
    assert not there["out"].exists()


def test_the_whole_process_says_nothing_else(there: dict[str, Path]) -> None:
    """Warnings and log lines of libraries, which a test's own process has set up already, included."""
    command = "sample {checkpoint} --out {out} --classes cta"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command.format(**there).split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_refused(command, "unknown class 'cta'", done.returncode, done.stderr)
    assert done.stdout == ""
    assert not there["out"].exists()
