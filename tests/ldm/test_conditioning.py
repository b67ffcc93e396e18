import pytest
import torch

from ldm.conditioning import ClassConditioner, Conditioner, Conditioning, EmbeddingConditioner, concat, drop
from ldm.errors import UserError

CLASSES = ClassConditioner(["coffee", "rocket", "7", "cat"])


def embedded(*lengths: int, num_features: int = 2) -> list[torch.Tensor]:
    """Embeddings filled with 1, 2, ... so that rows can be told apart."""
    return [torch.full((length, num_features), float(row + 1)) for row, length in enumerate(lengths)]


def test_classes_are_found_by_name_then_by_index() -> None:
    # "7" is the name of class 2; "3" and 3 are the index of class 3; None is the null class.
    labels = CLASSES.encode(["rocket", "7", "3", 3, 0, None]).class_labels
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 2, 3, 3, 0, 4]


def test_no_conditions_are_no_rows() -> None:
    assert CLASSES.encode([]).num_rows == 0


def test_an_unknown_class_is_told_with_what_is_allowed_and_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        CLASSES.encode(["rokcet"])
    assert str(caught.value) == (
        "unknown class 'rokcet'; allowed: coffee, rocket, 7, cat; or an index from 0 to 3; "
        "did you mean 'rocket'?"
    )


@pytest.mark.parametrize("condition", [4, -1, "4", "", "zebra"])
def test_what_is_no_class_is_refused(condition: str | int) -> None:
    with pytest.raises(UserError, match="unknown class"):
        CLASSES.encode([condition])


def test_a_long_list_of_classes_is_cut_short_in_the_message() -> None:
    with pytest.raises(UserError) as caught:
        ClassConditioner([f"class{index}" for index in range(1000)]).encode(["?"])
    assert "class19, ...; or an index from 0 to 999" in str(caught.value)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_class_names_must_be_distinct_and_some(names: list[str]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        ClassConditioner(names)


def test_embeddings_are_padded_and_masked() -> None:
    encoded = EmbeddingConditioner(torch.zeros(1, 2)).encode(embedded(1, 3))
    assert encoded.embeddings is not None
    assert encoded.mask is not None
    assert encoded.embeddings[..., 0].tolist() == [[1, 0, 0], [2, 2, 2]]
    assert encoded.mask.tolist() == [[True, False, False], [True, True, True]]


def test_embeddings_of_one_length_need_no_mask() -> None:
    encoded = EmbeddingConditioner(torch.zeros(1, 2)).encode(embedded(3, 3))
    assert encoded.mask is None
    assert encoded.num_rows == 2


@pytest.mark.parametrize("shape", [(3,), (0, 2), (3, 5)])
def test_an_embedding_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        EmbeddingConditioner(torch.zeros(1, 2)).encode([torch.zeros(shape)])


def test_concat_pads_masked_and_unmasked_batches_to_one_length() -> None:
    conditioner = EmbeddingConditioner(torch.zeros(1, 2))
    both = concat([conditioner.encode(embedded(2, 1)), conditioner.encode(embedded(3))])
    assert both.embeddings is not None
    assert both.mask is not None
    assert both.embeddings[..., 1].tolist() == [[1, 1, 0], [2, 0, 0], [1, 1, 1]]
    assert both.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_concat_keeps_the_order_of_labels() -> None:
    joined = concat([CLASSES.encode([2, 0]), CLASSES.null, CLASSES.encode([1])]).class_labels
    assert joined is not None
    assert joined.tolist() == [2, 0, 4, 1]


def test_concat_of_no_condition_is_no_condition() -> None:
    assert concat([Conditioning(), Conditioning()]).num_rows is None


@pytest.mark.parametrize("other", [Conditioning(), Conditioning(embeddings=torch.zeros(1, 1, 2))])
def test_different_kinds_of_condition_do_not_mix(other: Conditioning) -> None:
    with pytest.raises(ValueError, match="different kinds"):
        concat([CLASSES.null, other])


def test_drop_replaces_exactly_the_rows_not_kept() -> None:
    dropped = drop(CLASSES.encode([0, 1, 2]), torch.tensor([True, False, True]), CLASSES.null).class_labels
    assert dropped is not None
    assert dropped.tolist() == [0, 4, 2]


def test_drop_of_embeddings_pads_with_a_longer_null() -> None:
    conditioner = EmbeddingConditioner(torch.full((2, 2), 9.0))
    dropped = drop(conditioner.encode(embedded(1, 1)), torch.tensor([True, False]), conditioner.null)
    assert dropped.embeddings is not None
    assert dropped.mask is not None
    assert dropped.embeddings[..., 0].tolist() == [[1, 0], [9, 9]]
    assert dropped.mask.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("keep", [torch.tensor([True]), torch.tensor([1, 0])])
def test_drop_refuses_another_shape_or_dtype(keep: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="keep_B"):
        drop(CLASSES.encode([0, 1]), keep, CLASSES.null)


@pytest.mark.parametrize(
    ("conditioner", "conditions"),
    [(CLASSES, [1, 0, 2]), (EmbeddingConditioner(torch.full((2, 2), 9.0)), embedded(1, 2, 3))],
)
def test_the_unconditional_counterpart_is_null_in_every_row(
    conditioner: Conditioner[object], conditions: list[object]
) -> None:
    unconditional = conditioner.encode(conditions).unconditional(conditioner.null)
    assert unconditional.num_rows == 3
    expected = concat([conditioner.null] * 3)
    for name in ("class_labels", "embeddings"):
        got, want = getattr(unconditional, name), getattr(expected, name)
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


def test_select_takes_rows_in_order_and_repeats_them() -> None:
    batch = EmbeddingConditioner(torch.zeros(1, 2)).encode(embedded(1, 3)).select(torch.tensor([1, 0, 1]))
    assert batch.embeddings is not None
    assert batch.mask is not None
    assert batch.embeddings[:, 0, 0].tolist() == [2, 1, 2]
    assert batch.mask.sum(1).tolist() == [3, 1, 3]


def test_to_changes_the_dtype_of_embeddings_only() -> None:
    batch = Conditioning(torch.tensor([1]), torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    moved = batch.to("meta", torch.float16)
    assert moved.class_labels is not None
    assert moved.embeddings is not None
    assert moved.mask is not None
    tensors = (moved.class_labels, moved.embeddings, moved.mask)
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.float16, torch.bool]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("labels", "embeddings", "mask"),
    [
        (torch.tensor([1.0]), None, None),
        (torch.tensor([[1]]), None, None),
        (None, torch.zeros(2, 3), None),
        (None, torch.zeros(2, 3, 4, dtype=torch.int64), None),
        (None, None, torch.ones(2, 3, dtype=torch.bool)),
        (None, torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
        (None, torch.zeros(2, 3, 4), torch.ones(2, 3)),
        (torch.tensor([1]), torch.zeros(2, 3, 4), None),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    labels: torch.Tensor | None, embeddings: torch.Tensor | None, mask: torch.Tensor | None
) -> None:
    with pytest.raises(ValueError, match=r"must be|beside"):
        Conditioning(labels, embeddings, mask)
