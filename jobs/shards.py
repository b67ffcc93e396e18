"""``ldm shards``: a folder of images → WebDataset tars."""

from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from pipelines.pack import Packing, pack

__all__ = ["ShardsJob"]


class ShardsJob(Packing, JobConfig):
    """Pack a folder of images into WebDataset tars.

    A sub-folder is a class, a .txt beside an image its caption. OUT must be new or empty.
    """

    src: CliPositionalArg[Path] = Field(description="folder of images")
    out: CliPositionalArg[Path] = Field(description="folder for the tars")

    def run(self) -> dict[str, object]:
        """Numbers of shards and samples, class names, and pictures skipped by reason."""
        packed = pack(self.src, self.out, self)
        classes = len(packed.class_names)
        print(f"{packed.samples} samples of {classes} classes in {packed.shards} shards: {self.out}")
        for reason, count in packed.skipped.items():
            print(f"skipped {count}: {reason}")
        return asdict(packed)
