import torch

from ldm.tiling.maps import BandedMap, Storage
from ldm.tiling.spans import Rect, Span

CPU, FP32 = torch.device("cpu"), torch.float32


def test_room_of_a_dropped_band_is_used_again_for_two_smaller_ones_and_no_other_is_touched() -> None:
    storage, dropped, kept = Storage(), BandedMap(4, (8, 6)), torch.randn(1, 4, 4, 6)
    dropped.new_band(Span(0, 4), storage, FP32)
    dropped.new_band(Span(4, 8), storage, FP32)
    lower = Rect(Span(4, 8), Span(0, 6))
    dropped.write(lower, kept)
    upper = dropped.read(Rect(Span(0, 4), Span(0, 6)), CPU, FP32).data_ptr()

    dropped.drop_before(4)
    smaller = BandedMap(4, (4, 6))
    for rows in (Span(0, 2), Span(2, 4)):
        smaller.new_band(rows, storage, FP32)
        smaller.write(Rect(rows, Span(0, 6)), torch.full((1, 4, 2, 6), float(rows.start)))

    halves = [smaller.read(Rect(rows, Span(0, 6)), CPU, FP32) for rows in (Span(0, 2), Span(2, 4))]
    assert [half.data_ptr() - upper for half in halves] == [0, 2 * 6 * 4 * 4]
    assert [half.unique().tolist() for half in halves] == [[0.0], [2.0]]
    assert torch.equal(dropped.read(lower, CPU, FP32), kept)


def test_room_that_is_too_small_is_given_up() -> None:
    storage, small, large = Storage(), BandedMap(4, (2, 6)), BandedMap(4, (2, 60))
    small.new_band(Span(0, 2), storage, FP32)
    small.drop_before(2)

    large.new_band(Span(0, 2), storage, FP32)

    assert large.read(Rect(Span(0, 2), Span(0, 60)), CPU, FP32).shape == (1, 4, 2, 60)
