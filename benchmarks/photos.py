"""Collect the photographs that the default VAEs are trained on, and those held out to judge them.

    python benchmarks/photos.py out/photos      # Debian: apt-get and dpkg-deb; pip: the `demo` extra

writes ``train/`` and ``heldout/``. Every photograph comes from a Debian main package or from
scikit-image / scikit-learn, so all are freely licensed. The split is by rule, not by result: every
colour photograph of the pip packages is held out (``make demo`` shows pictures the VAE never saw),
and every fourth Debian photograph in the order of PHOTOS, but for two that are painted.
``motorcycle_right``, the stereo twin of a held-out photograph, is in neither.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = (
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "tuxpaint-stamps-default",
    "ukui-wallpapers",
)

# What is a photograph was decided by eye: these packages hold drawings and renderings as well.
PHOTOS = (
    "backgrounds/mate/nature/*.jpg",
    "backgrounds/Bridge_by_*.jpg",
    "backgrounds/Dragonfly_by_*.jpg",
    "backgrounds/Infinite-Sea_by_*.jpg",
    "backgrounds/Kleiber_by_*.jpg",
    "backgrounds/Painting-Colors_by_*.jpg",
    "backgrounds/Picture_*_by_*.jpg",
    "backgrounds/Wine_by_*.jpg",
    "backgrounds/aitzgorri_by_*.jpg",
    "backgrounds/free_by_*.jpg",
    "backgrounds/friends_by_*.jpg",
    "backgrounds/greentock_by_*.jpg",
    "backgrounds/life_by_*.jpg",
    "backgrounds/picosdeeuropa_by_*.jpg",
    "backgrounds/seeding_by_*.jpg",
    "backgrounds/sunset_by_*.jpg",
    *(
        f"wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in (
            "Autumn",
            "BytheWater",
            "ColdRipple",
            "ColorfulCups",
            "DarkestHour",
            "EveningGlow",
            "FallenLeaf",
            "Grey",
            "Kite",
            "OneStandsOut",
            "Path",
            "summer_1am",
        )
    ),
    "wallpapers/Volna/contents/images/5120x2880.jpg",
)
HELD_OUT_EVERY = 4
# Held out by their place in the list, and then seen to be painted: in neither set.
PAINTED = ("backgrounds/Painting-Colors_by_", "wallpapers/Autumn/")

# Renderings and paintings with photographic gradients: training material only.
PICTURES = (
    "backgrounds/Fossa_by_*.jpg",
    "backgrounds/mate/abstract/Elephants_3840x2160.jpg",
    "backgrounds/2004default.jpg",
    "backgrounds/string.jpg",
    "wallpapers/SafeLanding/contents/images/5120x2880.jpg",
)

# Stamps are small cut-outs; the larger ones that are not drawings of symbols are worth training on.
STAMPS = "tuxpaint/stamps"
STAMPS_LEFT_OUT = ("symbols", "cartoon", "seasonal", "flags", "roadsigns")
STAMP_MIN_SIDE_PX = 128

DEMO_PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
DEMO_PHOTOS_SKLEARN = ("china.jpg", "flower.jpg")


def unpack(folder: Path) -> Path:
    """Download and unpack PACKAGES into ``folder``; returns their common ``usr/share``."""
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    return folder / "root" / "usr" / "share"


def stamps(share: Path) -> list[Path]:
    """The stamp pictures worth training on, in name order."""
    from PIL import Image

    chosen = []
    for path in sorted((share / STAMPS).rglob("*.png")):
        parts = path.relative_to(share / STAMPS).parts
        if not set(parts) & set(STAMPS_LEFT_OUT) and min(Image.open(path).size) >= STAMP_MIN_SIDE_PX:
            chosen.append(path)
    return chosen


def demo_photos() -> list[Path]:
    """The colour photographs that scikit-image and scikit-learn carry."""
    import skimage
    import sklearn.datasets

    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_images = Path(sklearn.datasets.__file__).parent / "images"
    return [skimage_data / n for n in DEMO_PHOTOS] + [sklearn_images / n for n in DEMO_PHOTOS_SKLEARN]


def flat_name(path: Path, root: Path) -> str:
    """``wallpapers/Kite/contents/images/2560x1600.jpg`` → ``Kite-2560x1600.jpg``."""
    parts = [p for p in path.relative_to(root).parts if p not in ("contents", "images", "wallpapers")]
    return "-".join(parts[-2:])


def collect(out: Path) -> tuple[int, int]:
    """Fill ``out/train`` and ``out/heldout``; returns how many pictures each one holds."""
    train, heldout = out / "train", out / "heldout"
    for folder in (train, heldout):
        folder.mkdir(parents=True, exist_ok=False)
    with tempfile.TemporaryDirectory() as scratch:
        share = unpack(Path(scratch))
        photos = [path for pattern in PHOTOS for path in sorted(share.glob(pattern))]
        for index, path in enumerate(photos):
            if path.relative_to(share).as_posix().startswith(PAINTED):
                continue
            folder = heldout if index % HELD_OUT_EVERY == 0 else train
            shutil.copyfile(path, folder / flat_name(path, share))
        pictures = [path for pattern in PICTURES for path in sorted(share.glob(pattern))]
        for path in pictures + stamps(share):
            shutil.copyfile(path, train / flat_name(path, share))
    for path in demo_photos():
        shutil.copyfile(path, heldout / path.name)
    return len(list(train.iterdir())), len(list(heldout.iterdir()))


if __name__ == "__main__":
    num_train, num_heldout = collect(Path(sys.argv[1]))
    print(f"{num_train} pictures to train on, {num_heldout} photographs held out")
