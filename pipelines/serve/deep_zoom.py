"""An image file as a Deep Zoom pyramid: what a viewer needs to look into an image of any size.

    tiles.dzi                          XML: size of the image, of a tile and of the overlap
    tiles_files/<level>/<x>_<y>.jpg    level 0 is one pixel, each next one twice as large, the last the image

libvips makes all levels in one pass from top to bottom.
"""

from pathlib import Path

import pyvips

__all__ = ["write_tiles"]

TILE_PX = 512
OVERLAP_PX = 1
# dzsave has Q as an argument too, and ignores it. From 90 on, libvips keeps colours at full size.
SUFFIX = ".jpg[Q=90]"


def write_tiles(image_file: Path, folder: Path) -> None:
    """Make ``folder``, with the tiles of a PNG, JPEG or WebP file of 8-bit RGB or grey.

    8192×8192 takes 90 MB and two seconds. A WebP file cannot be read row after row: 570 MB.
    FileExistsError where there is such a folder. pyvips.Error where the file is damaged: what there is then
    has no tiles.dzi.
    """
    folder.mkdir(parents=True)
    image = pyvips.Image.new_from_file(str(image_file), access="sequential", fail_on="error")
    image.dzsave(
        str(folder / "tiles"), tile_size=TILE_PX, overlap=OVERLAP_PX, depth="onepixel", suffix=SUFFIX
    )
    # Nothing about the image, but of the library that made it.
    (folder / "tiles_files" / "vips-properties.xml").unlink()
