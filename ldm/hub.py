"""The model hub: what an id looks like, and fetching a model's files with errors that a person can act on."""

import re
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import UserError

__all__ = ["download", "is_hub_id"]

# What the hub allows as owner/name; anything else that is no folder is a mistyped one.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.git)", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether the hub could know this name: ``owner/name``."""
    return HUB_ID.fullmatch(name) is not None


def download(hub_id: str, files: Sequence[str], *, kind: str, folder_example: str) -> Path:
    """The local folder of a hub model, fetched or from the cache; only ``files`` (patterns) are in it.

    kind: what the model is to the user, such as ``VAE``; folder_example: what could be given instead.
    UserError where there is no such model, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no {kind} at {hub_id!r}, neither a folder here nor a public model of the hub",
            do="check the name; for a private model set HF_TOKEN",
        ) from error
    except OSError as error:
        raise UserError(
            f"the model hub cannot be reached for {kind} {hub_id!r} and it is not in the local cache "
            f"({type(error).__name__})",
            do=f"check the network or give {folder_example}",
        ) from error
