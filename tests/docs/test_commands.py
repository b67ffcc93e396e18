"""The commands of README.md and docs/ run: ``make test-docs``, where ``-rs`` names what is not run, and why.

Each page has a folder of its own, with what its comment ``<!-- needs: … -->`` names, and its blocks of ``sh``
and ``python`` run there in their order, with the numbers of `page_shell.SMALLER`. They join one Ray with
logical GPUs.
"""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.docs.markdown_page import ROOT, Block, blocks, needs, pages
from tests.docs.page_shell import PageShell

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

# Of what may hang; the block's own deadline tells what it had printed.
pytestmark = [pytest.mark.docs, pytest.mark.timeout(900)]
RUNNABLE = [block for page in pages() for block in blocks(page) if block.language in ("sh", "python")]
MADE = """\
ldm shards PHOTOS SHARDS --crop-px 64 --crops-per-image 12
ldm encode SHARDS LATENTS --preprocess.sizes-px 64
ldm encode SHARDS PAIRS --preprocess.sizes-px 64,256
ldm train LATENTS CHECKPOINT --train.steps 2
ldm train PAIRS UPSAMPLER --train.data.size-px 256 --train.data.low-size-px 64 --train.steps 2
cp -r UPSAMPLER UP1
cp -r UPSAMPLER UP2
"""


def name_of(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray with 8 logical CPUs and GPUs, however many there are."""
    import ray

    from jobs.cluster import ClusterConfig, connected

    with connected(ClusterConfig(num_cpus=8, num_gpus=8)):
        yield str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """A folder of everything that a page may need, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    _write_pictures(folder)
    shell = PageShell(folder, key="", port=0, RAY_ADDRESS=cluster)
    shell.run("sh", MADE)
    return folder


def _write_pictures(folder: Path) -> None:
    """Crops of two photographs as classes, pictures of 64 px, a mask and a latent."""
    import skimage.data
    import sklearn.datasets
    from PIL import Image

    photos = {"cat": skimage.data.chelsea(), "temple": sklearn.datasets.load_sample_image("china.jpg")}
    for name, photo_HW3 in photos.items():
        (folder / "PHOTOS" / name).mkdir(parents=True)
        Image.fromarray(photo_HW3[:256, :256]).save(folder / "PHOTOS" / name / f"{name}.png")
    for name, photo in (("image", "cat"), ("a", "cat"), ("b", "temple")):
        Image.fromarray(photos[photo][:256, :256]).resize((64, 64)).save(folder / f"{name}.png")
    mask_HW = np.zeros((64, 64), np.uint8)
    mask_HW[16:48, 16:48] = 255
    Image.fromarray(mask_HW).save(folder / "mask.png")
    np.save(folder / "LATENT.npy", np.random.default_rng(0).normal(size=(4, 48, 48)).astype(np.float32))


def _first_key(dataset: Path) -> str:
    import pyarrow.parquet as pq

    file = min((dataset / "data").rglob("*.parquet"))
    return str(pq.read_table(file, columns=["key"])["key"][0].as_py())


@pytest.fixture(scope="module")
def page(
    request: pytest.FixtureRequest, made: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PageShell]:
    """The folder of one page."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    for name in needs(request.param):
        copy = shutil.copytree if (made / name).is_dir() else shutil.copyfile
        copy(made / name, folder / name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    shell = PageShell(folder, key=_first_key(made / "LATENTS"), port=port, RAY_ADDRESS=cluster)
    yield shell
    shell.close()


def _parameters(block: Block) -> "ParameterSet":
    why = f"{name_of(block)} is not run: {block.not_run}"
    marks = [pytest.mark.skip(reason=why)] if block.not_run else []
    return pytest.param(block.page, block, id=name_of(block), marks=marks)


@pytest.mark.parametrize(
    ("page", "block"), [_parameters(block) for block in RUNNABLE], indirect=["page"], scope="module"
)
def test_block_runs(page: PageShell, block: Block) -> None:
    page.run(block.language, block.text)
