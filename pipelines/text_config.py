"""Which text conditioning a dataset has: an encoder run in the job, or embeddings made beforehand."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["TextConfig"]


class TextConfig(BaseModel):
    """Where the embeddings of captions come from; with nothing set, from nowhere: none are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str | None = Field(None, description="hub id or folder of a transformers text encoder")
    layer: int | None = Field(
        None, description="which of its hidden states, -2 for the last but one; none: its output"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="longer captions are cut; none: the most that the encoder takes"
    )
    precomputed: str | None = Field(
        None, description="field of a sample with its embedding as .npy, such as t5.npy"
    )

    @property
    def is_on(self) -> bool:
        """Whether embeddings are stored at all."""
        return self.encoder is not None or self.precomputed is not None

    @model_validator(mode="after")
    def _check_one_source(self) -> "TextConfig":
        if self.encoder is not None and self.precomputed is not None:
            raise ValueError("encoder and precomputed exclude each other: embeddings have one source")
        if self.encoder is None and (self.layer is not None or self.max_tokens is not None):
            raise ValueError("layer and max_tokens are options of an encoder; set encoder too")
        return self
