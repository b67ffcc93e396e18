"""``ldm generate``: every image is that of its request, a tar is made once, and again with the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from ldm.images import decode_image
from pipelines.class_names import read_class_names
from pipelines.generate import Request
from pipelines.generated_shards import ImagePlan
from pipelines.shards import list_shards, read_samples
from tests.pipelines.images_by_hand import images_by_hand

OPTIONS = "--num-images 7 --images-per-shard 3 --steps 2 --seed 5 --guidance 2"
ACTORS = "--pools.sampler.num-cpus 0.5 --pools.sampler.batch-size 2 --pools.decoder.num-cpus 0.5"


def generate(checkpoint: Path, out: Path, more: str = "") -> int:
    return cli.main(f"generate {checkpoint} {out} {OPTIONS} {ACTORS} {more}".split())


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset(
    checkpoint_folders: dict[str, Path],
    vae_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = checkpoint_folders["v_prediction"], tmp_path / "out"
    assert generate(folder, out, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["images"], result["made"]) == (7, 7)
    shards = list_shards(out)
    assert [shard.name for shard in shards] == ["shard-000000", "shard-000001", "shard-000002"]
    assert read_class_names(str(out)) == ("cat", "dog")
    samples = [sample for shard in shards for sample in read_samples(shard)]
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in range(7)]
    assert [sample.label() for sample in samples] == [0, 1, 0, 1, 0, 1, 0]
    assert samples[3].record() == {
        "class": "dog", "label": 1, "seed": 8, "guidance": 2.0, "num_inference_steps": 2, "scheduler": "ddim",
    }  # fmt: skip
    for n, made in enumerate(samples):
        image = np.asarray(decode_image(made.image_bytes())).astype(int)
        (alone,) = images_by_hand(folder, vae_folder, [Request(n % 2, 5 + n, 2.0, 2, "ddim")])
        assert np.abs(image - alone).max() <= 1

    whole = tars(out)
    (out / "shard-000001.tar").unlink()
    (out / "generate.yaml").unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert generate(folder, out, "--pools.decoder.size 2 --json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] == 3
    assert tars(out) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (out / "generate.yaml").exists()
    assert generate(folder, out, "--steps 3") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "holds a run of another kind (num_inference_steps: 3, was 2)" in said
    assert tars(out) == whole


@pytest.mark.parametrize(("num_images", "unit_size"), [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_units_hold_every_image_once(num_images: int, unit_size: int) -> None:
    plan = ImagePlan(num_images, unit_size, (None,), 0, 1.0, 2, "ddim")
    units = [list(plan.unit(index)) for index in range(plan.num_units)]
    assert [number for unit in units for number in unit] == list(range(num_images))
    assert all(len(unit) == unit_size for unit in units[:-1]) and units[-1]
