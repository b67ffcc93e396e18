"""What the whole session shares: an environment without network or threads, one Ray cluster, tiny models."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

# Before anything imports torch, ray or huggingface_hub, all of which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's own interval of 10 s would be waited for by every test that reads a metric.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
os.environ.pop("RAY_ADDRESS", None)
# The shared cluster has no dashboard. Left to look for one, Ray Train would ask that of another
# cluster on this machine whether its controller lives, and end the training on a "no".
os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with 4 CPUs and 2 logical GPUs; a test that does not ask starts none."""
    from jobs.cluster import ClusterConfig, connected

    with connected(ClusterConfig(num_cpus=4, num_gpus=2)):
        yield


def pytest_collection_finish(session: pytest.Session) -> None:
    """Send functions of test modules to Ray's workers as code: a worker cannot import those modules.

    Some distributions install a package called ``tests``, which would be found there instead.
    """
    modules = {item.module for item in session.items if "ray_cluster" in item.fixturenames}
    if modules:
        from ray.cloudpickle import register_pickle_by_value

        for module in modules:
            register_pickle_by_value(module)


def save_random_vae(folder: Path, seed: int) -> Path:
    """An AutoencoderKL of 8 channels, f = 4, 3 latent channels, in diffusers' format."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VAE with f = 4."""
    return save_random_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="session")
def other_vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of the same layout with other weights."""
    return save_random_vae(tmp_path_factory.mktemp("other_vae"), seed=1)


@pytest.fixture(scope="session")
def photo() -> Callable[[int], bytes]:
    """seed → a PNG of 40×32 pixels."""
    import numpy as np

    from ldm.images import encode_png

    def make(seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        return encode_png(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def write_latents(vae_folder: Path) -> Callable[..., Path]:
    """(folder, count=20, size_px=32, …) → a latent dataset of ``vae_folder`` made by hand, 8 rows a unit.

    Moments are random, keys ``k0``, ``k1``, …; labels go round the classes, and the last row has none.
    """
    import numpy as np
    import torch

    from ldm.autoencoder import load
    from ldm.latents import LatentStats, Moments
    from ldm.preprocess import Preprocess
    from pipelines.dataset import LatentDataset
    from pipelines.dataset_records import Commit, DatasetHeader, StoredStats
    from pipelines.latent_table import LatentRows, MomentArrays, data_bytes

    fingerprint = load(vae_folder).fingerprint

    def write(
        folder: Path,
        count: int = 20,
        size_px: int = 32,
        class_names: Sequence[str] | None = ("cat", "dog"),
        unit_sizes_px: Sequence[int] = (),
        captions: Sequence[str | None] = (),
    ) -> Path:
        """unit_sizes_px: the images' size in each unit, where it is to differ; captions: of the first."""
        header = DatasetHeader(
            vae=str(vae_folder),
            vae_fingerprint=fingerprint,
            f=4,
            channels=3,
            preprocess=Preprocess(sizes_px=(size_px,)),
            unit_size=8,
            class_names=None if class_names is None else tuple(class_names),
        )
        dataset = LatentDataset.create_or_check(folder, header)
        rng = np.random.default_rng(0)
        for index, start in enumerate(range(0, count, 8)):
            rows = range(start, min(start + 8, count))
            side = (unit_sizes_px[index] if unit_sizes_px else size_px) // 4
            mean = rng.normal(3, 2, (len(rows), 3, side, side)).astype(np.float16)
            std = np.exp(rng.normal(-1, 0.3, mean.shape)).astype(np.float16)
            labels = [i % 2 if class_names and i < count - 1 else None for i in rows]
            none = [None] * len(rows)
            texts = [captions[i] if i < len(captions) else None for i in rows]
            latents = LatentRows([f"k{i}" for i in rows], labels, texts, none, MomentArrays(mean, std))
            unit = f"unit-{index:06d}"
            stats = LatentStats.of(Moments(torch.from_numpy(mean), torch.from_numpy(std)))
            bucket = f"{4 * side}x{4 * side}"
            file = dataset.publish(
                f"data/{bucket}/{unit}.parquet", data_bytes(latents, header.form), len(rows)
            )
            dataset.commit(
                Commit(
                    unit=unit,
                    shard="file:///a.tar",
                    shard_version="1",
                    index=index,
                    is_final=start + 8 >= count,
                    num_inputs=len(rows),
                    num_rows=len(rows),
                    num_quarantined=0,
                    quarantined={},
                    files=(file,),
                    quarantine_file=None,
                    stats=StoredStats(count=stats.count, mean=stats.mean_C, m2=stats.m2_C),
                )
            )
        dataset.write_derived()
        return folder

    return write


@pytest.fixture(scope="session")
def latent_folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows of latents (3, 8, 8), classes cat and dog."""
    return write_latents(tmp_path_factory.mktemp("latents") / "dataset")


def save_checkpoint(folder: Path, model: object, prediction: str, vae: Path, **info: object) -> Path:
    """A checkpoint of latents (3, 8, 8) for that U-Net; info: what else `CheckpointInfo` is to say."""
    from ldm import checkpoint
    from ldm.autoencoder import load
    from ldm.objective import NoiseSchedule

    checkpoint.save(
        folder,
        ema=model,
        last=model,
        scheduler_config=NoiseSchedule(prediction=prediction).scheduler_config(),  # type: ignore[arg-type]
        info=checkpoint.CheckpointInfo(
            step=1,
            latent_shape=(3, 8, 8),
            shift=(0.5, -0.5, 0.0),
            scale=(1.0, 2.0, 0.5),
            vae=str(vae),
            vae_fingerprint=load(vae).fingerprint,
            **info,  # type: ignore[arg-type]
        ),
    )
    return folder


@pytest.fixture(scope="session")
def checkpoint_folders(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """prediction → a checkpoint with random weights: latents (3, 8, 8), classes cat and dog."""
    import torch

    from ldm import unet

    folders = {}
    for prediction in ("v_prediction", "flow"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = unet.build("tiny", in_channels=3, num_classes=2, sample_size=8)
        folder = tmp_path_factory.mktemp(prediction)
        folders[prediction] = save_checkpoint(
            folder, model, prediction, vae_folder, class_names=("cat", "dog")
        )
    return folders


@pytest.fixture(scope="session")
def save_upsampler(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(seed, prediction="v_prediction", vae=…) → a random upsampler × 2 of latents (3, 8, 8)."""
    import torch

    from ldm import unet

    def save(seed: int, prediction: str = "v_prediction", vae: Path = vae_folder) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = unet.build(
                "tiny", in_channels=6, out_channels=3, num_classes=None, num_noise_levels=1000, sample_size=8
            )
        return save_checkpoint(
            tmp_path_factory.mktemp("upsampler"),
            model,
            prediction,
            vae,
            class_names=None,
            upsampling_factor=2,
            max_noise_level=100,
            residual_shift=(0.0, 0.0, 0.0),
            residual_scale=(0.5, 1.0, 0.25),
        )

    return save
