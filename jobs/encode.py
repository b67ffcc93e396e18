"""``ldm encode``: images → latent dataset."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg

from jobs.cluster import ClusterConfig, connected
from jobs.config import JobConfig
from ldm.preprocess import Preprocess
from pipelines.encode.pools import EncoderPool, TaskPool, TextPool
from pipelines.shards import InputConfig
from pipelines.storage_form import StorageForm
from pipelines.text_config import TextConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from ldm.vae_identity import VaeIdentity
    from pipelines.dataset import LatentDataset
    from pipelines.dataset_records import DatasetHeader, TextRecord
    from pipelines.encode.backlog import Backlog
    from pipelines.encode.pipeline import ActorStage
    from pipelines.encode.report import EncodeSummary, UnitReport
    from pipelines.lease import Lease

__all__ = ["EncodeJob"]


class EncodeJob(JobConfig):
    """Encode images into a latent dataset.

    Run it again after any interruption: it goes on where it was. Inputs that cannot be encoded are
    in OUTPUT/quarantine, each with its reason.
    """

    input: CliPositionalArg[str] = Field(
        description="folder or URL of WebDataset tars or Parquet files, of images, or a list of files"
    )
    output: CliPositionalArg[str] = Field(description="folder or URL of the latent dataset")
    vae: str = Field("f8", description="default model (f4, f8, f16), diffusers folder, URL or hub id")
    read: InputConfig = InputConfig()
    preprocess: Preprocess = Preprocess()
    form: StorageForm = StorageForm()
    text: TextConfig = TextConfig()
    keep_fields: tuple[str, ...] = Field((), description="fields of the input that rows keep, as JSON")
    unit_size: PositiveInt = Field(256, description="samples that are committed together")
    max_bad_share: float = Field(0.5, ge=0, le=1, description="of the inputs; beyond it the job fails")
    reader: TaskPool = TaskPool(num_cpus=0.25)
    decode: TaskPool = TaskPool()
    encoder: EncoderPool = EncoderPool()
    text_encoder: TextPool = TextPool()
    subcluster: str | None = Field(
        None,
        description="of a running cluster: only nodes whose label ray-subcluster has this value, and only "
        "such are asked of its autoscaler; without it nodes without that label",
    )
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _subcluster_is_of_a_running_cluster(self) -> "EncodeJob":
        if self.subcluster is not None and self.cluster.address is None:
            raise ValueError(
                f"subcluster '{self.subcluster}' is for a running cluster, whose nodes have labels; "
                "give cluster.address too, or leave it out"
            )
        return self

    def run(self, watch: "Callable[[UnitReport], None]" = lambda report: None) -> dict[str, object]:
        """Encode what is not committed yet; returns what `pipelines.encode.report.EncodeSummary` holds.

        watch: called for every unit once it is committed.
        """
        from ldm.vae_identity import check_size, identify
        from pipelines.dataset import LatentDataset
        from pipelines.encode.backlog import find_backlog, require_image
        from pipelines.lease import writer_lease
        from pipelines.shards import list_shards

        # Everything that the user can have got wrong is found before anything is written.
        vae = identify(self.vae)
        for height, width in self.preprocess.shapes():
            check_size(self.vae, vae.f, height, width)
        shards = list_shards(self.input, self.read)
        require_image(shards, self.preprocess, self.read)
        header = self._header(vae)
        with ExitStack() as stack:
            if find_backlog(shards, LatentDataset.check(self.output, header)).shards:
                self._connect(stack, has_text=self.text.encoder is not None)
            dataset = LatentDataset.create_or_check(self.output, header)
            lease = stack.enter_context(writer_lease(dataset.filesystem, dataset.root, self.output))
            # Once more: only now does nobody else write.
            summary = self._encode(dataset, find_backlog(shards, dataset), lease, watch)
        print(
            f"{summary.rows} images in {summary.seconds:.1f} s ({summary.images_per_s:.1f} images/s), "
            f"{summary.bytes_per_image:.0f} bytes each; {summary.units_done} units done, "
            f"{summary.units_skipped} skipped; quarantined: {_counts(summary.quarantined)}"
        )
        for shard in summary.retired_shards:
            print(f"shard {shard} was edited: its new rows have replaced the old ones")
        for shard in summary.removed_shards:
            print(f"shard {shard} is not in the input any more: its rows stay")
        return asdict(summary)

    def _connect(self, stack: ExitStack, *, has_text: bool) -> None:
        from pipelines.encode.pipeline import require_resources

        # Else reading would wait for decoding on a small machine, or keep it waiting for a whole shard.
        stack.enter_context(connected(self.cluster, spare_cpus=1))
        if self.cluster.address is None:
            require_resources(self.decode, self.encoder, *([self.text_encoder] if has_text else []))

    def _encode(
        self,
        dataset: "LatentDataset",
        backlog: "Backlog",
        lease: "Lease",
        watch: "Callable[[UnitReport], None]",
    ) -> "EncodeSummary":
        from jobs.encode_page import Throughput, publish_page
        from jobs.encode_view import encode_view
        from pipelines.encode.decode import Judge
        from pipelines.encode.metrics import EncodeMetrics
        from pipelines.encode.pipeline import encode, vae_stage
        from pipelines.vae_source import on_every_node

        header = dataset.header

        # Without anything to do there is no cluster to report to.
        count = EncodeMetrics().add if backlog.shards else lambda report: None
        throughput = Throughput()
        with encode_view(len(backlog.shards)) as show:

            def committed(report: "UnitReport") -> None:
                lease.check()
                for told in (show, count, throughput.add, watch):
                    told(report)

            summary = encode(
                dataset,
                backlog,
                Judge(self.preprocess, header.class_names, self.keep_fields, self.text.precomputed),
                read_pool=self.reader,
                decode_pool=self.decode,
                encoder=vae_stage(header, on_every_node(self.vae), self.encoder),
                text=self._text_stage(header.text),
                max_bad_share=self.max_bad_share,
                subcluster=self.subcluster,
                watch=committed,
            )
        if summary.units_done:
            page = publish_page(dataset, summary, throughput, self.input, self.output)
            print(f"summary: {self.output.rstrip('/')}/{page}")
        return summary

    def _header(self, vae: "VaeIdentity") -> "DatasetHeader":
        from pipelines.class_names import read_class_names
        from pipelines.dataset_records import DatasetHeader

        return DatasetHeader(
            vae=self.vae,
            vae_fingerprint=vae.fingerprint,
            f=vae.f,
            channels=vae.channels,
            form=self.form,
            preprocess=self.preprocess,
            input=self.read,
            pass_through=self.keep_fields,
            text=self._text_record(),
            unit_size=self.unit_size,
            class_names=read_class_names(self.input),
        )

    def _text_record(self) -> "TextRecord | None":
        from pipelines.dataset_records import TextRecord

        config = self.text
        if config.encoder is None:
            return TextRecord(config=config) if config.is_on else None
        from ldm.text import load_text_encoder

        encoder = load_text_encoder(config.encoder, layer=config.layer, max_tokens=config.max_tokens)
        return TextRecord(config=config, fingerprint=encoder.fingerprint, width=encoder.width)

    def _text_stage(self, record: "TextRecord | None") -> "ActorStage | None":
        from pipelines.encode.pipeline import text_stage
        from pipelines.vae_source import on_every_node

        if record is None or record.config.encoder is None:
            return None
        source = on_every_node(record.config.encoder)
        return text_stage(record.config.model_copy(update={"encoder": source}), record, self.text_encoder)


def _counts(quarantined: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in quarantined.items()) or "none"
