"""What a U-Net is conditioned on: class labels, embeddings, or nothing.

Classifier-free guidance (Ho & Salimans 2022) needs a *null* condition beside every real one. Here
it is a `Conditioning` of one row, so dropping a condition, or pairing a batch with its
unconditional counterpart, is nothing but choosing rows.

Shape suffixes: B rows (images), L tokens, D features of an embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError

__all__ = ["ClassConditioner", "Conditioner", "Conditioning", "EmbeddingConditioner", "concat", "drop"]

MAX_NAMES_IN_ERROR = 20
ConditionT_contra = TypeVar("ConditionT_contra", contravariant=True)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditions of a batch, row by row.

    ``class_labels``: int64 (B,), or None. ``embeddings``: float (B, L, D), the U-Net's
    ``encoder_hidden_states``, or None. ``mask``: bool (B, L), True at the tokens that count; None
    means all of them. With all three None it is the condition of an unconditional model and fits
    any batch.

    Raises ValueError if dtypes or shapes disagree.
    """

    class_labels: Tensor | None = None
    embeddings: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        labels, embeddings, mask = self.class_labels, self.embeddings, self.mask
        if labels is not None and (labels.ndim != 1 or labels.dtype != torch.int64):
            raise ValueError(f"class_labels must be int64 (B,), got {_describe(labels)}")
        if embeddings is not None and (embeddings.ndim != 3 or not embeddings.is_floating_point()):
            raise ValueError(f"embeddings must be float (B, L, D), got {_describe(embeddings)}")
        if mask is not None and (embeddings is None or mask.shape != embeddings.shape[:2]):
            raise ValueError(f"mask must be (B, L) beside embeddings, got {_describe(mask)}")
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {_describe(mask)}")
        if labels is not None and embeddings is not None and len(labels) != len(embeddings):
            raise ValueError(f"{len(labels)} class labels beside {len(embeddings)} embeddings")

    @property
    def num_rows(self) -> int | None:
        """B, or None if there is no condition at all."""
        first = self.class_labels if self.class_labels is not None else self.embeddings
        return None if first is None else len(first)

    def select(self, index_N: Tensor) -> Conditioning:
        """Rows ``index_N`` (int64 (N,), repeats allowed), in that order."""
        return Conditioning(
            None if self.class_labels is None else self.class_labels[index_N.to(self.class_labels.device)],
            None if self.embeddings is None else self.embeddings[index_N.to(self.embeddings.device)],
            None if self.mask is None else self.mask[index_N.to(self.mask.device)],
        )

    def unconditional(self, null: Conditioning) -> Conditioning:
        """The one-row ``null``, once for every row of this batch."""
        _check_null(null)
        return null.select(torch.zeros(self.num_rows or 0, dtype=torch.int64))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all to ``device``; ``dtype`` is for the embeddings only."""
        return Conditioning(
            None if self.class_labels is None else self.class_labels.to(device=device),
            None if self.embeddings is None else self.embeddings.to(device=device, dtype=dtype),
            None if self.mask is None else self.mask.to(device=device),
        )


def concat(batches: Sequence[Conditioning]) -> Conditioning:
    """One batch out of several, rows in order; embeddings are padded to the longest, and masked.

    Raises ValueError if there is none, or if one has a kind of condition that another lacks.
    """
    if not batches:
        raise ValueError("nothing to concatenate")
    labels = [batch.class_labels for batch in batches if batch.class_labels is not None]
    embedded = [batch for batch in batches if batch.embeddings is not None]
    if len(labels) not in (0, len(batches)) or len(embedded) not in (0, len(batches)):
        raise ValueError("cannot concatenate different kinds of condition")
    embeddings, mask = _concat_embeddings(embedded) if embedded else (None, None)
    return Conditioning(torch.cat(labels) if labels else None, embeddings, mask)


def drop(conditioning: Conditioning, keep_B: Tensor, null: Conditioning) -> Conditioning:
    """Replace the rows where ``keep_B`` (bool (B,)) is False by the one-row ``null``.

    This is the condition dropout that makes one U-Net serve as the conditional and as the
    unconditional model (Ho & Salimans 2022, algorithm 1). Which rows to drop is the caller's to
    decide, with randomness keyed by sample.
    """
    _check_null(null)
    if keep_B.dtype != torch.bool or keep_B.shape != (conditioning.num_rows,):
        raise ValueError(f"keep_B must be bool ({conditioning.num_rows},), got {_describe(keep_B)}")
    null_row = len(keep_B)
    index_B = torch.where(keep_B, torch.arange(null_row, device=keep_B.device), null_row)
    return concat([conditioning, null]).select(index_B)


class Conditioner(Protocol[ConditionT_contra]):
    """Turns what a user asks for into what a U-Net takes."""

    @property
    def null(self) -> Conditioning:
        """The condition that stands for "none": one row."""

    def encode(self, conditions: Sequence[ConditionT_contra]) -> Conditioning:
        """One row for each condition, on the CPU. Raises UserError for one that does not exist."""


class ClassConditioner:
    """Classes by name or index; label ``len(class_names)`` is the null class.

    A U-Net for it has ``len(class_names) + 1`` class embeddings (see `ldm.unet.build`).
    Raises ValueError if ``class_names`` is empty or has a name twice.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class names must be distinct, and at least one; got {self.class_names}")
        # Names win over digits: a class may be called "7" without being number seven.
        self._labels = {str(label): label for label in range(len(self.class_names))}
        self._labels |= {name: label for label, name in enumerate(self.class_names)}

    @property
    def null(self) -> Conditioning:
        return Conditioning(class_labels=torch.tensor([len(self.class_names)]))

    def encode(self, conditions: Sequence[str | int | None]) -> Conditioning:
        """Labels of ``conditions``: a class's name, its index (also as digits), None for null."""
        return Conditioning(
            class_labels=torch.tensor([self._label(c) for c in conditions], dtype=torch.int64)
        )

    def _label(self, condition: str | int | None) -> int:
        if condition is None:
            return len(self.class_names)
        if isinstance(condition, str) and condition in self._labels:
            return self._labels[condition]
        if isinstance(condition, int) and 0 <= condition < len(self.class_names):
            return condition
        raise self._unknown(str(condition))

    def _unknown(self, condition: str) -> UserError:
        names = ", ".join(self.class_names[:MAX_NAMES_IN_ERROR])
        if len(self.class_names) > MAX_NAMES_IN_ERROR:
            names += ", ..."
        nearest = difflib.get_close_matches(condition, self.class_names, n=1)
        return UserError(
            f"unknown class {condition!r}",
            allowed=f"{names}; or an index from 0 to {len(self.class_names) - 1}",
            do=f"did you mean {nearest[0]!r}?" if nearest else "",
        )


class EmbeddingConditioner:
    """Embeddings computed beforehand, or by a text encoder.

    ``null_embedding_LD``: float (L, D), for example the encoding of the empty text.
    """

    def __init__(self, null_embedding_LD: Tensor) -> None:
        if null_embedding_LD.ndim != 2 or not len(null_embedding_LD):
            raise ValueError(f"the null embedding must be (L, D), got {_describe(null_embedding_LD)}")
        self._null = Conditioning(embeddings=null_embedding_LD[None])

    @property
    def null(self) -> Conditioning:
        return self._null

    def encode(self, conditions: Sequence[Tensor]) -> Conditioning:
        """Embeddings, each float (L_i, D) with its own L_i, padded to the longest and masked.

        Raises ValueError if one has no token, or another D than the null embedding.
        """
        assert self._null.embeddings is not None
        num_features = self._null.embeddings.shape[2]
        for embedding_LD in conditions:
            if embedding_LD.ndim != 2 or not len(embedding_LD) or embedding_LD.shape[1] != num_features:
                raise ValueError(f"an embedding must be (L, {num_features}), got {_describe(embedding_LD)}")
        return concat([Conditioning(embeddings=embedding_LD[None]) for embedding_LD in conditions])


def _concat_embeddings(batches: Sequence[Conditioning]) -> tuple[Tensor, Tensor | None]:
    parts = [batch.embeddings for batch in batches if batch.embeddings is not None]
    length = max(part.shape[1] for part in parts)
    if all(batch.mask is None for batch in batches) and all(part.shape[1] == length for part in parts):
        return torch.cat(parts), None
    masks = [
        torch.ones(part.shape[:2], dtype=torch.bool, device=part.device) if batch.mask is None else batch.mask
        for batch, part in zip(batches, parts, strict=True)
    ]
    padded_parts = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts]
    padded_masks = [F.pad(mask, (0, length - mask.shape[1])) for mask in masks]
    return torch.cat(padded_parts), torch.cat(padded_masks)


def _check_null(null: Conditioning) -> None:
    if null.num_rows != 1:
        raise ValueError(f"the null condition must have one row, got {null.num_rows}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
