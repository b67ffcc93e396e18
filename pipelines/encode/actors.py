"""The classes of ENCODE's actor pools: each loads its model once, then works on one unit per call.

They import torch when they start, so that the driver, which only names them, does without.
"""

import math
import platform
import threading
from abc import ABC, abstractmethod
from dataclasses import replace

import pyarrow as pa

from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.encode.attempts import Attempt, Register, attempt
from pipelines.encode.pools import ActorPool, EncoderPool, TextPool
from pipelines.encode.rows import DecodedUnit, EncodedUnit, ReadUnit
from pipelines.encode.write import write_unit
from pipelines.storage_form import StorageForm
from pipelines.text_config import TextConfig

__all__ = ["CALLS_AT_ONCE", "CommittingEncoder", "UnitEncoder", "UnitTextEncoder"]

# Of a `CommittingEncoder`: one encodes, another commits.
CALLS_AT_ONCE = 2


class CommittingEncoder(ABC):
    """An encoder that commits a unit while it encodes the next one.

    Called by `CALLS_AT_ONCE` threads. Were writing a stage of its own, any number of encoded units could
    wait for it, and all of them would be lost with the driver; so an actor's death loses what it encodes
    and at most one unit that is encoded already.
    """

    def __init__(self, dataset: LatentDataset, register: Register) -> None:
        self.dataset, self.register = dataset, register
        self._turn = threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        """`DecodedUnit` row → `UnitReport` row, once the unit is committed."""
        unit = DecodedUnit.from_table(table)
        with self._turn, attempt(self.register, "encode", unit.unit.id) as this_attempt:
            encoded = self.encode(unit, this_attempt)
        return write_unit(self.dataset, encoded).to_table()

    @abstractmethod
    def encode(self, unit: DecodedUnit, this_attempt: Attempt) -> EncodedUnit:
        """Latents of a unit; one call at a time."""


class UnitEncoder(CommittingEncoder):
    """A VAE on its device."""

    def __init__(
        self,
        vae: str,
        fingerprint: str,
        form: StorageForm,
        pool: EncoderPool,
        dataset: LatentDataset,
        register: Register,
    ) -> None:
        super().__init__(dataset, register)
        from ldm.autoencoder import load
        from pipelines.device import pick_device
        from pipelines.encode.micro_batches import ImageEncoder

        _fix_threads(pool)
        autoencoder = load(vae)
        _require_same(f"VAE {vae}", autoencoder.fingerprint, fingerprint)
        self.encoder = ImageEncoder(autoencoder, pool, pick_device())
        self.form = form

    def encode(self, unit: DecodedUnit, this_attempt: Attempt) -> EncodedUnit:
        """One forward pass of the VAE for each micro-batch."""
        from pipelines.encode.encoder import encode_unit

        return encode_unit(self.encoder, unit, self.form, this_attempt)


class UnitTextEncoder:
    """A text encoder on its device."""

    def __init__(self, config: TextConfig, fingerprint: str, pool: TextPool, register: Register) -> None:
        import torch

        from ldm.text import load_text_encoder
        from pipelines.device import pick_device

        _fix_threads(pool)
        assert config.encoder is not None
        encoder = load_text_encoder(config.encoder, layer=config.layer, max_tokens=config.max_tokens)
        _require_same(f"text encoder {config.encoder}", encoder.fingerprint, fingerprint)
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.encoder = encoder.to(pick_device(), dtypes[pool.precision])
        self.micro_batch, self.register = pool.micro_batch, register

    def __call__(self, table: pa.Table) -> pa.Table:
        """`ReadUnit` row → the same with the embeddings of its captions."""
        from pipelines.encode.text import embed_unit

        unit = ReadUnit.from_table(table)
        with attempt(self.register, "text", unit.content.unit.id):
            embedded = embed_unit(self.encoder, unit.content.samples, self.micro_batch)
        return replace(unit, embedded=embedded).to_table()


def _fix_threads(pool: ActorPool) -> None:
    import torch

    # Fixed, because the number of threads can change the last bits of a convolution or a matrix product.
    torch.set_num_threads(max(1, math.floor(pool.num_cpus)))


def _require_same(what: str, fingerprint: str, on_driver: str) -> None:
    """What lies under a path on this node need not be what the driver read there."""
    if fingerprint != on_driver:
        raise UserError(
            f"{what} on node {platform.node()} is another than on the driver",
            do="give every node the same files",
        )
