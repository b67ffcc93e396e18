"""Files of a latent dataset that no commit names: what killed writers and edited shards leave behind."""

from dataclasses import dataclass

from pipelines.dataset import LatentDataset

__all__ = ["Garbage", "find_garbage", "remove_garbage"]

FOLDERS = ("data", "text", "quarantine", "commits", "versions")


@dataclass(frozen=True)
class Garbage:
    """Paths inside the dataset, commits before the files that they name, and their size in bytes."""

    paths: tuple[str, ...]
    bytes: int


def find_garbage(dataset: LatentDataset, *, retired: bool) -> Garbage:
    """What can go; only true while nobody writes. retired: also versions of shards that no longer count."""
    current = set(dataset.units())
    kept = [unit for unit in dataset.committed_units() if not retired or unit in current]
    named = {file.path for commit in dataset.commits(kept) for file in commit.all_files()}
    named |= {f"commits/{unit}.json" for unit in kept}
    named |= {f"versions/{name}.json" for name in dataset.current_families()}
    found = {
        path: size
        for folder in FOLDERS
        for path, size in _files(dataset, folder).items()
        if path not in named
    }
    order = sorted(found, key=lambda path: (not path.startswith("commits/"), path))
    return Garbage(tuple(order), sum(found.values()))


def remove_garbage(dataset: LatentDataset, garbage: Garbage) -> None:
    """Remove it, commits first: killed on the way, what is left is garbage still."""
    for path in garbage.paths:
        dataset.filesystem.rm_file(dataset.path(path))


def _files(dataset: LatentDataset, folder: str) -> dict[str, int]:
    root = dataset.path(folder)
    if not dataset.filesystem.exists(root):
        return {}
    dataset.filesystem.invalidate_cache(root)
    found = dataset.filesystem.find(root, detail=True)
    return {path[len(dataset.root) + 1 :]: int(info["size"]) for path, info in found.items()}
