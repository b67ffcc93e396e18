"""Where a VAE lies, told so that every node of the cluster finds it."""

from pathlib import Path

from ldm.vae_files import default_names

__all__ = ["on_every_node"]


def on_every_node(vae: str) -> str:
    """A relative folder made absolute: workers have another working directory.

    Everything else that `ldm.autoencoder.load` takes (default names, URLs, hub ids) stays as it is.
    """
    folder = Path(vae).expanduser()
    return str(folder.resolve()) if vae not in default_names() and folder.is_dir() else vae
